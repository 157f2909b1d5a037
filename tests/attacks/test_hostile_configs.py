"""Method: the config beside the weights of a transformers model is changed as an attacker would. A build ends in one of our errors or in a
model with the stored weights. It asks for no kernel, sends nothing, and takes neither the time nor the memory that the config asks for.
"""

from __future__ import annotations

import http.server
import json
import os
import resource
import socket
import subprocess
import sys
import threading
import time
import warnings
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from transformers.integrations import hub_kernels

import shardsave
from shardsave._huggingface.transformers_construction import Offline, offline
from support import same_state
from transformers_models import tiny

pytestmark = [pytest.mark.slow, pytest.mark.filterwarnings("ignore:.*config.json is not the one saved")]

transformers.logging.set_verbosity_error()

KERNEL = "somebody/kernel"
HIDDEN = {"attribute_map": {"zz": "_attn_implementation"}, "zz": KERNEL}
MANY = 10**9


def nested(depth: int, name: str = "a", inner: Any = 1) -> Any:
    for _ in range(depth):
        inner = {name: inner}
    return inner


def nested_llava(depth: int) -> Any:
    config: dict[str, Any] = {"model_type": "llama"}
    for _ in range(depth):
        config = {"model_type": "llava", "text_config": config}
    return config


@pytest.fixture(scope="module")
def saved(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The directory of a saved model of the named architecture; it is saved once, and its config is restored at each call."""
    configs: dict[Path, bytes] = {}
    top = tmp_path_factory.mktemp("configs")

    def find(name: str) -> Path:
        folder = top / name.replace(" ", "-")
        if folder not in configs:
            shardsave.save(tiny(name), folder, durable=False)
            configs[folder] = (folder / "config.json").read_bytes()
        (folder / "config.json").write_bytes(configs[folder])
        return folder

    return find


def change(folder: Path, changes: dict[str, Any]) -> None:
    """Changes the config in ``folder``; a table within it keeps its other entries."""

    def merged(old: dict[str, Any], new: dict[str, Any]) -> dict[str, Any]:
        both = {key for key in new if isinstance(new[key], dict) and isinstance(old.get(key), dict)}
        return {**old, **new, **{key: merged(old[key], new[key]) for key in both}}

    config = folder / "config.json"
    config.write_text(json.dumps(merged(json.loads(config.read_text()), changes)))


def built(folder: Path) -> Any:
    return shardsave.build_model(folder, trust=["transformers"])


KERNELS: list[tuple[str, dict[str, Any]]] = [
    ("BERT", HIDDEN),
    ("BERT", {"attribute_map": {"zz": "_attn_implementation_internal"}, "zz": KERNEL}),
    ("BERT", {"attribute_map": {"zz": "_experts_implementation"}, "zz": KERNEL}),
    ("BERT", {"attn_implementation": KERNEL, "_attn_implementation": KERNEL, "_attn_implementation_internal": KERNEL}),
    ("BERT", {"experts_implementation": KERNEL, "_experts_implementation_internal": KERNEL}),
    ("BERT", {"per_layer_config": {"0": {"_attn_implementation_internal": KERNEL, "attn_implementation": KERNEL}}}),
    ("BERT", {"auto_map": {"AutoModel": "somebody/code--modeling.Net"}, "name_or_path": KERNEL, "_commit_hash": "0"}),
    ("BERT", {"kernel_config": {"RMSNorm": KERNEL}, "use_kernels": True, "sub_configs_defaults": {"zz": {}}}),
    ("CLIP", {"text_config": HIDDEN}),
    ("CLIP", {"vision_config": {"_attn_implementation_internal": KERNEL}}),
    ("LLaVA", {"text_config": HIDDEN, "vision_config": HIDDEN}),
    ("DETR", {"backbone_config": HIDDEN}),
]


@pytest.mark.parametrize(("name", "changes"), KERNELS, ids=str)
def test_no_kernel_is_asked_for(
    name: str, changes: dict[str, Any], saved: Callable[[str], Path], monkeypatch: pytest.MonkeyPatch
) -> None:
    """Catches an attribute of a config, under any name, that chooses what computes the attention."""
    asked: list[object] = []

    def get_kernel(*arguments: object, **options: object) -> None:
        asked.append(arguments)
        raise FileNotFoundError

    monkeypatch.setattr(hub_kernels, "get_kernel", get_kernel)
    monkeypatch.setattr(hub_kernels, "is_kernels_available", lambda *arguments, **options: True)
    folder = saved(name)
    change(folder, changes)
    model = built(folder)
    assert asked == [] and same_state(model, tiny(name)) and KERNEL not in repr(vars(model.config))


def test_a_hidden_implementation_would_be_asked_for() -> None:
    """Catches a change of transformers that would make the test above pass whatever a config says."""
    config = transformers.BertConfig(**HIDDEN)
    assert config._attn_implementation == KERNEL


class Hub(http.server.ThreadingHTTPServer):
    """A server in the place of the Hub that counts what it is asked."""

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), Handler)
        self.asked: list[str] = []


class Handler(http.server.BaseHTTPRequestHandler):
    server: Hub

    def do_GET(self) -> None:
        self.server.asked.append(f"{self.path} {self.headers.get('authorization')}")
        self.send_error(404)

    do_HEAD = do_POST = do_GET

    def log_message(self, *arguments: object) -> None:
        pass


@pytest.fixture
def hub() -> Iterator[Hub]:
    with Hub() as server:
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


BUILDS = """
import json, pathlib, sys, warnings
import shardsave, transformers
from transformers.utils import hf_api
warnings.simplefilter("ignore")
transformers.logging.set_verbosity_error()
folder = pathlib.Path(sys.argv[1])
config = json.loads((folder / "config.json").read_text())
for changes in json.loads(sys.argv[2]):
    (folder / "config.json").write_text(json.dumps({**config, **changes}))
    try:
        shardsave.build_model(folder, trust=["transformers"])
    except shardsave.IncompatibleCheckpointError as error:
        print(str(error).removeprefix(f"cannot build a model from {folder}/config.json: "))
try:
    hf_api().model_info("somebody/other")
except Exception:
    pass
"""

FETCHING: list[dict[str, Any]] = [
    {"backbone": "somebody/repo", "backbone_config": None, "use_timm_backbone": False},
    {"backbone": "repo", "backbone_config": None, "use_timm_backbone": False},
    {"backbone": "repo", "backbone_config": None, "use_timm_backbone": True, "backbone_kwargs": {"num_channels": 3}},
    {"backbone": "hf-hub:somebody/repo", "backbone_config": None, "use_pretrained_backbone": True},
    {"backbone_config": {"model_type": "timm_backbone", "backbone": "hf-hub:somebody/repo"}},
]


def test_no_request_is_sent(saved: Callable[[str], Path], hub: Hub, tmp_path: Path) -> None:
    """Catches a build that asks the Hub for anything, with the user's token; and a process that stays offline after it."""
    environment = {
        **os.environ, "PYTHONPATH": ":".join(sys.path), "HF_ENDPOINT": f"http://127.0.0.1:{hub.server_port}", "HF_TOKEN": "hf_secret",
        "HF_HOME": str(tmp_path), "HF_HUB_DISABLE_TELEMETRY": "1",
    }  # fmt: skip
    folder = saved("DETR")
    command = [sys.executable, "-c", BUILDS, str(folder), json.dumps(FETCHING)]
    printed = subprocess.run(command, capture_output=True, text=True, check=True, env=environment).stdout.splitlines()
    assert len(printed) == len(FETCHING), printed
    assert printed[0] == "backbone: a word expected, it is 'somebody/repo'; nothing was built"
    assert (
        "it asked for something from the Hub, and nothing is fetched while a model is built; use from_pretrained" in printed[1]
    )
    assert hub.asked == ["/api/models/somebody/other Bearer hf_secret"]  # the last line of the program, outside a build


def test_only_the_building_thread_is_offline(hub: Hub) -> None:
    """Catches a guard that stays after an error, that other threads meet, or that a socket opened elsewhere gets past."""
    from huggingface_hub import constants

    before = (constants.HF_HUB_OFFLINE, socket.getaddrinfo, socket.socket.connect)
    address = ("127.0.0.1", hub.server_port)

    def connect() -> None:
        socket.create_connection(address).close()

    def elsewhere() -> None:
        assert not constants.HF_HUB_OFFLINE
        connect()
        done.append(True)

    done: list[bool] = []
    with pytest.raises(ZeroDivisionError), offline({threading.get_ident()}):
        assert constants.HF_HUB_OFFLINE
        with pytest.raises(Offline, match="nothing is fetched while a model is built"):
            connect()
        with pytest.raises(Offline), socket.socket() as opened:
            opened.connect(address)
        thread = threading.Thread(target=elsewhere)
        thread.start()
        thread.join()
        _ = 1 / 0
    connect()
    assert done and before == (constants.HF_HUB_OFFLINE, socket.getaddrinfo, socket.socket.connect)
    assert "connect" not in vars(socket.socket)


NUMBER = "a number up to {}, as for the tensors of this checkpoint expected"
LARGE = "a model with the sizes of the checkpoint expected, its config leads to more than"
DEEP = "...: at most 8 levels expected"
RAISED = "was expected to be built from it, it raised "

#: Architecture, changes of its config, what the error says.
REFUSED: list[tuple[str, dict[str, Any], str]] = [
    ("BERT", {"num_hidden_layers": MANY}, f"num_hidden_layers: {NUMBER.format(1068)}, it is {MANY}"),
    ("BERT", {"num_hidden_layers": 1000}, LARGE),
    ("BERT", {"vocab_size": 10**12}, f"vocab_size: {NUMBER.format(1 << 25)}"),
    ("BERT", {"intermediate_size": 1 << 24}, LARGE),
    ("BERT", {"num_labels": MANY}, f"num_labels: {NUMBER.format(1 << 16)}"),
    ("BERT", {"id2label": {str(number): "" for number in range(100_000)}}, "id2label: at most 65536 labels expected"),
    ("BERT", {"pad_token_id": -(10**30)}, f"pad_token_id: a number from -1024 up to {1 << 25}, as for"),
    ("BERT", {"layer_types": ["x"] * 10**5}, "layer_types: at most 1068 layers expected"),
    ("BERT", {"hidden_size": "many"}, RAISED),
    ("BERT", {"hidden_size": [16]}, RAISED),
    ("BERT", {"hidden_size": {"a": 1}}, RAISED),
    ("BERT", {"hidden_size": float("nan")}, RAISED),
    ("BERT", {"hidden_size": -16}, RAISED),
    ("BERT", {"num_attention_heads": 0}, RAISED),
    ("BERT", {"id2label": "x"}, RAISED),
    ("BERT", {"dtype": "load"}, "dtype: a dtype of torch expected, it is 'load'"),
    ("BERT", {"torch_dtype": ["float32"]}, "torch_dtype: a dtype of torch expected"),
    ("BERT", {"hidden_act": "/etc/passwd"}, "hidden_act: a word expected"),
    ("BERT", {"transformers_version": "\x1b[31m"}, r"transformers_version: a word expected, it is '\x1b[31m'"),
    ("Llama", {"rope_parameters": nested(900)}, DEEP),
    ("Llama", {"per_layer_config": nested(900)}, "per_layer_config.a: arguments of the layer with that number expected"),
    (
        "Llama",
        {"per_layer_config": {str(number): {} for number in range(2000)}},
        "per_layer_config: at most 1045 layers expected",
    ),
    ("Llama", {"per_layer_config": {"0": {"num_hidden_layers": MANY}}}, "per_layer_config.0.num_hidden_layers: a number"),
    ("Llama", {"rope_parameters": {"rope_type": "/x", "rope_theta": 1}}, "rope_parameters.rope_type: a word expected"),
    ("Qwen3", {"num_hidden_layers": MANY, "layer_types": None}, "num_hidden_layers: a number up to"),
    ("Swin", {"depths": [MANY, 1]}, "depths: at most 1069 layers expected"),
    ("Swin", {"depths": [1000] * 1000, "drop_path_rate": 0.5}, "depths: at most 1069 layers expected"),
    ("Swin", {"window_size": 10**6}, LARGE),
    ("Swin", {"mlp_ratio": 1e12}, f"mlp_ratio: {NUMBER.format(1 << 25)}, it is 1000000000000.0"),
    ("Swin", {"mlp_ratio": 1e6}, LARGE),
    ("Mixtral", {"num_local_experts": 10**6}, LARGE),
    ("ALBERT", {"num_hidden_groups": 1 << 24}, LARGE),
    ("GPT-2", {"n_positions": 1 << 24}, LARGE),
    ("LLaVA", {"text_config": nested_llava(300)}, DEEP),
    ("LLaVA", {"text_config": {"model_type": "nothing"}}, "text_config.model_type: a type of model"),
    ("LLaVA", {"text_config": {"model_type": ["llama"]}}, "text_config.model_type: a type of model"),
    ("LLaVA", {"text_config": {"num_hidden_layers": MANY}}, "text_config.num_hidden_layers: a number up to"),
    ("LLaVA", {"text_config": "llama"}, RAISED),
    ("DETR", {"backbone_config": {"depths": [MANY]}}, "backbone_config.depths: at most"),
]


@pytest.mark.parametrize(("name", "changes", "said"), REFUSED, ids=lambda value: str(value)[:40])
def test_what_cannot_fit_is_refused_at_once(
    name: str, changes: dict[str, Any], said: str, saved: Callable[[str], Path]
) -> None:
    """Catches a size, a number of layers or a depth that is believed, and an error of transformers or of the stack."""
    folder = saved(name)
    change(folder, changes)
    peak, begun = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.monotonic()
    with pytest.raises(shardsave.IncompatibleCheckpointError) as raised:
        built(folder)
    assert said in str(raised.value)
    assert time.monotonic() - begun < 10 and resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - peak < 400_000


IGNORED: list[tuple[str, dict[str, Any]]] = [
    (
        "Llama",
        {"zz": nested(900), "to_dict": 1, "get_text_config": "x", "validate": None, "__class__": "x", "keys_to_ignore": []},
    ),
    ("Llama", {"rope_theta": 10**12, "sliding_window": 1 << 60}),
    ("BERT", {"layer_norm_eps": float("nan"), "label2id": {"a path/with: anything": 1}}),
]


@pytest.mark.parametrize(("name", "changes"), IGNORED, ids=lambda value: str(value)[:40])
def test_what_no_class_names_is_left_out(name: str, changes: dict[str, Any], saved: Callable[[str], Path]) -> None:
    """Catches a key that replaces a method of a config, and an odd value of no consequence that is refused."""
    folder = saved(name)
    change(folder, changes)
    model = built(folder)
    assert same_state(model, tiny(name)) and not {"zz", "to_dict", "validate"} & vars(model.config).keys()


def test_a_generation_config_replaces_no_code(saved: Callable[[str], Path]) -> None:
    """Catches a setting that hides a method, or that chooses a compiler; and a model's own setting that is lost."""
    folder = saved("Whisper")
    settings = {"to_dict": 1, "validate": 1, "_pad": 1, "compile_config": {"backend": "x"}, "lang_to_id": {"<|en|>": 1}}
    (folder / "generation_config.json").write_text(json.dumps(settings))
    config = built(folder).generation_config
    assert config.lang_to_id == {"<|en|>": 1} and config.compile_config is None
    assert not {"to_dict", "validate", "_pad"} & vars(config).keys()


def test_a_constructor_that_catches_everything_is_stopped() -> None:
    """Catches a limit that is lost in ``except Exception``, and memory that is allocated before it is counted."""
    from shardsave._huggingface.transformers_construction import CountedTensors

    counted = CountedTensors("a model", 1, 1)
    with counted, torch.device("meta"):
        torch.empty(1 << 20)
        with pytest.raises(shardsave.IncompatibleCheckpointError, match="cannot build a model: "):
            torch.linspace(0, 1, 1 << 40, device="cpu")
    with pytest.raises(shardsave.IncompatibleCheckpointError, match="more than 4104 tensors or 67108872 numbers"):
        counted.check()


def test_each_release_of_a_config_is_understood() -> None:
    """Catches a class of transformers whose own default config loses an argument, or is refused, by the choice of arguments."""
    from transformers import CONFIG_MAPPING

    from shardsave._huggingface.transformers_arguments import ConfigArguments

    chooser, lost = ConfigArguments("a model", 300, 60_000), []
    for model_type in sorted(CONFIG_MAPPING.keys())[::9]:
        config_class = CONFIG_MAPPING[model_type]
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            written = json.loads(config_class().to_json_string(use_diff=False))
        chosen = chooser.choose(config_class, written)
        fields = {name for name, parameter in config_class.__dataclass_fields__.items() if parameter.init}
        lost += [f"{model_type}.{name}" for name in (fields & written.keys()) - chosen.keys() - {"architectures"}]
    assert lost == []
