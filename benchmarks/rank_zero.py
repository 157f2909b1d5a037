"""Simulates a save of very many ranks: what rank 0 receives through the store of the job, and how long it computes.

    python rank_zero.py DIRECTORY [RANKS ...] [--seconds 20] [--layers 126]

Rank 0 is this process: it calls `shardsave.save` with a model of Llama's shape that FSDP2 would have sharded over all ranks. A second
process stands for all other ranks, eight on a host: it sets in the store what their hosts would set, made by the same functions. So
meeting, description, digests, votes, signs of life and the commit are those of a real save. What is left out: the tensors (they do not
pass through rank 0, but for the files that it owns), and the writing, which is SECONDS of waiting. Files are empty.
The last line of the output is JSON.
"""

from __future__ import annotations

import argparse
import contextlib
import json
import multiprocessing
import os
import shutil
import socket
import struct
import subprocess
import sys
import time
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist
from torch import nn

RANKS_OF_HOST = 8
WIDTH, INNER, KEYS, VOCABULARY = 16384, 53248, 1024, 128_256  # as in Llama 3.1 405B


def sharded_model(ranks: int, layers: int) -> nn.Module:
    """The parameters of a Llama with so many layers, of which this rank holds the first rows. The memory is never touched."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import DTensor, Shard

    mesh = init_device_mesh("cpu", (ranks,))
    shapes = {"q": (WIDTH, WIDTH), "k": (KEYS, WIDTH), "v": (KEYS, WIDTH), "o": (WIDTH, WIDTH), "gate": (INNER, WIDTH)}
    shapes |= {"up": (INNER, WIDTH), "down": (WIDTH, INNER), "norm1": (WIDTH,), "norm2": (WIDTH,)}

    def parameter(shape: tuple[int, ...]) -> nn.Parameter:
        part = torch.empty(min(-(-shape[0] // ranks), shape[0]), *shape[1:], dtype=torch.bfloat16)
        stride = torch.empty(shape, device="meta").stride()
        return nn.Parameter(DTensor.from_local(part, mesh, [Shard(0)], run_check=False, shape=torch.Size(shape), stride=stride))

    model = nn.Module()
    for name, shape in {"embedding": (VOCABULARY, WIDTH), "head": (VOCABULARY, WIDTH)}.items():
        model.register_parameter(name, parameter(shape))
    for number in range(layers):
        layer = nn.Module()
        for name, shape in shapes.items():
            layer.register_parameter(name, parameter(shape))
        model.add_module(f"layer_{number}", layer)
    return model


class Others:
    """All ranks but rank 0, in one process: ``pipe`` says what they have to say, phase by phase."""

    def __init__(self, ranks: int, pipe: Connection) -> None:
        from shardsave._ranks.arrivals import Call
        from shardsave._ranks.heartbeat import Pulse
        from shardsave._ranks.store_connection import StoreConnection

        store = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)  # as in the agent of torchrun
        pipe.send(store.port)
        key, call, rank_timeout = pipe.recv()
        self._line = StoreConnection(store, f"shardsave/{key}")
        self._line.open()
        self._hosts = [range(begin, min(begin + RANKS_OF_HOST, ranks)) for begin in range(1, ranks, RANKS_OF_HOST)]
        self._call = Call(*call)
        self._pulse = Pulse(rank_timeout)
        self._pipe = pipe
        self._beat = 0

    def run(self) -> None:
        session = self._meet()
        self._pipe.send("met")
        while True:
            if self._pulse.due():
                self._beat += 1
                self._line.set_all({f"{session}/beat/{host}": b"%d" % self._beat for host in range(1, len(self._hosts) + 1)})
            if self._pipe.poll(min(0.2, self._pulse.rest())):
                message = self._pipe.recv()
                if message is None:
                    break
                self._say(session, *message)
        self._line.set_all({f"{session}/beat/{host}": b"left" for host in range(1, len(self._hosts) + 1)})
        self._line.add(f"{session}/left", len(self._hosts))
        self._pipe.send("left")
        self._pipe.recv()  # rank 0 has left too, which deletes keys

    def _meet(self) -> str:
        """Lets all ranks arrive. Returns the name of the session."""
        from shardsave._ranks.arrivals import Arrival

        tokens = {}
        for number, host in enumerate(self._hosts):
            arrivals = {
                rank: Arrival(os.urandom(8).hex(), self._call.digest, f"{number:016x}", f"node-{number}") for rank in host
            }
            tokens.update({rank: arrival.token for rank, arrival in arrivals.items()})
            self._line.set_all({f"called/{rank}": json.dumps(self._call).encode() for rank in host})
            self._line.set_all({f"arrived/{rank}": arrival.packed() for rank, arrival in arrivals.items()})
        while (answer := self._line.peek(f"answer/{tokens[1]}")) is None:
            time.sleep(0.01)
        kind, _, text = answer.partition(b" ")
        assert kind == b"session", answer
        return text.decode().split()[0]

    def _say(self, session: str, phase: int, everybody: bytes, some: dict[int, bytes]) -> None:
        """The leader of each host gives the values of its ranks: ``everybody``, but ``some`` say something else."""
        from shardsave._ranks.values import pack

        for number, host in enumerate(self._hosts, 1):
            key = f"{session}/up/{phase}/{number}"
            packed = pack([some.get(rank, everybody) for rank in host])
            self._line.set(key, self._line.stow(key, packed))
        self._line.add(f"{session}/count/{phase}", len(self._hosts))


def others(*arguments: Any) -> None:
    Others(*arguments).run()


class NoShipping:
    """In the place of the exchange of tensors: rank 0 owns nothing, files are empty, and the writing takes some time."""

    seconds = 0.0
    job: Any = None

    def __init__(self, session: Any, shards: list[Any], owners: list[int]) -> None:
        self.session, self.shards, self.owners = session, shards, owners
        self.exchange = self
        self.mine: list[int] = []
        self.own: list[Any] = []

    def start(self) -> None:
        pass

    def finish(self) -> None:
        folder = self.job._transaction._staging
        for name in self.job._all:
            Path(self.job._transaction.path, folder.name, name).touch()
        end = time.monotonic() + self.seconds
        while time.monotonic() < end:
            self.session.check()
            time.sleep(0.05)

    def close(self) -> None:
        pass

    def votes(self) -> dict[int, bytes]:
        """What the owners say at the end."""
        from shardsave._engine.totals import Totals
        from shardsave._format.index import ShardRecord
        from shardsave._ranks.save_messages import encode_written
        from shardsave._saving.job import Written

        records: dict[int, dict[str, ShardRecord]] = {}
        for name, shard, owner in zip(self.job._all, self.shards, self.owners):
            length = len(shard.header)
            record = ShardRecord(length + shard.layout.data_bytes, length, int.from_bytes(os.urandom(8), "little"))
            records.setdefault(owner, {})[name] = record
        return {owner: encode_written(Written(of, {}, Totals())) for owner, of in records.items()}


def transferred(port: int) -> tuple[int, int]:
    """The bytes that this process has sent to ``port`` and received from there, as the kernel counts them for its open connections."""
    sent = received = 0
    for name in os.listdir("/proc/self/fd"):
        with contextlib.suppress(OSError), socket.socket(fileno=os.dup(int(name))) as connection:
            if connection.family in (socket.AF_INET, socket.AF_INET6) and connection.getpeername()[1] == port:
                info = connection.getsockopt(socket.IPPROTO_TCP, socket.TCP_INFO, 136)
                acknowledged, from_there = struct.unpack_from("<QQ", info, 120)
                sent, received = sent + acknowledged, received + from_there
    return sent, received


def simulate(path: Path, ranks: int, layers: int, seconds: float) -> dict[str, Any]:
    """One save of ``ranks`` ranks."""
    from torch.testing._internal.distributed.fake_pg import FakeStore

    import shardsave
    from shardsave._ranks import group, save_job
    from shardsave._ranks import open_session as beginning
    from shardsave._ranks.session import Session
    from shardsave._storage.transaction import Transaction

    dist.init_process_group("fake", rank=0, world_size=ranks, store=FakeStore())
    model = sharded_model(ranks, layers)
    ours, theirs = multiprocessing.get_context("spawn").Pipe()
    process = multiprocessing.get_context("spawn").Process(target=others, args=(ranks, theirs), daemon=True)
    process.start()
    port = ours.recv()
    store = dist.TCPStore("127.0.0.1", port, is_master=False, wait_for_workers=False)
    lines = []
    shippings: list[NoShipping] = []
    begin, gather, close = beginning.begin_with, Session.gather, Session.close

    def begin_with_others(store: Any, members: Any, host: Any, call: Any, timeouts: Any, *more: Any) -> Session:
        ours.send((members.key, tuple(call), timeouts.rank))
        return begin(store, members, host, call, timeouts, *more)

    def gather_of_all(call: Session, what: str, mine: bytes) -> list[bytes] | None:
        if call._phase == 0:
            assert ours.recv() == "met"
        some = shippings[-1].votes() if what == "finished files" else {}
        phase, name = call._next(what)
        call._phase -= 1
        ours.send((phase, name + mine, {rank: name + value for rank, value in some.items()}))
        return gather(call, what, some.get(0, mine))

    def close_after_others(call: Session) -> None:
        ours.send(None)
        assert ours.recv() == "left"
        lines.append(call._post.line)
        close(call)

    class SaveExchange(NoShipping):
        def __init__(self, *arguments: Any) -> None:
            super().__init__(*arguments)
            shippings.append(self)

    make_job = save_job.SaveJob.__init__

    def note_job(job: Any, *arguments: Any, **options: Any) -> None:
        make_job(job, *arguments, **options)
        NoShipping.job = job

    NoShipping.seconds = seconds
    with contextlib.ExitStack() as stack:
        for owner, name, value in (
            (group, "job_store", lambda: store),
            (beginning, "begin_with", begin_with_others),
            (Session, "gather", gather_of_all),
            (Session, "close", close_after_others),
            (save_job, "SaveExchange", SaveExchange),
            (save_job.SaveJob, "__init__", note_job),
            (Transaction, "check_space", lambda transaction, nbytes: None),
        ):
            stack.enter_context(mock.patch.object(owner, name, value))
        wall, processor = time.perf_counter(), time.process_time()
        report = shardsave.save(model, path, progress=False, reuse=False)
        figures = {"wall": time.perf_counter() - wall, "processor": time.process_time() - processor}
    sent, received = transferred(port)
    ours.send(None)
    process.join()
    return figures | {
        "received": received,
        "sent": sent,
        "calls": lines[0].calls,
        "seconds": seconds,
        "tensors": sum(1 for _ in model.parameters()),
        "shards": len(shippings[-1].shards),
        "report": str(report),
    }


def simulate_apart(ranks: int, options: argparse.Namespace) -> dict[str, Any]:
    """`simulate` in a process of its own, since each has a group of another size."""
    command = [sys.executable, __file__, str(options.path), "--alone", str(ranks), "--seconds", str(options.seconds)]
    done = subprocess.run([*command, "--layers", str(options.layers)], capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(done.stderr)
    result: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return result


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("path", type=Path, metavar="DIRECTORY")
    parser.add_argument("ranks", type=int, nargs="*", metavar="RANKS")
    parser.add_argument("--seconds", type=float, default=20.0, help="that the writing takes")
    parser.add_argument("--layers", type=int, default=126)
    parser.add_argument("--alone", type=int, help=argparse.SUPPRESS)
    options = parser.parse_args()
    shutil.rmtree(options.path, ignore_errors=True)
    options.path.mkdir(parents=True)
    try:
        if options.alone:
            result: dict[str, Any] = simulate(options.path, options.alone, options.layers, options.seconds)
        else:
            result = {str(ranks): simulate_apart(ranks, options) for ranks in options.ranks or (1_000, 10_000)}
    finally:
        shutil.rmtree(options.path, ignore_errors=True)
    print("\n" + json.dumps(result))


if __name__ == "__main__":
    main()
