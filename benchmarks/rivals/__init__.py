"""Every tool that is measured, by name, shardsave first. To add one, write a `Tool` in a module of this folder."""

from rivals import distributed, hugging_face, loaders, safetensors_, shardsave_, torch_checkpointing_, torch_save

TOOLS = {
    tool.name: tool
    for module in (shardsave_, torch_save, safetensors_, hugging_face, distributed, torch_checkpointing_, loaders)
    for tool in module.TOOLS
}

#: Our own tools. Each rival is measured in turns with those that its `Tool.compared_with` names.
OURS = [tool.name for tool in shardsave_.TOOLS]

#: Tools that are not measured → the reason.
NOT_RUN = {
    "tensorizer": "not installed: pip was still trying versions of its dependency boto3 after three minutes",
    "torchstore": "not installed: it depends on torch==2.9.0",
    "bytecheckpoint": "not installed: it depends on torch<=2.5.0",
}
