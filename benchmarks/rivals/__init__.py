"""Every tool that is measured, by name, shardsave first. To add one, write a `Tool` in a module of this folder."""

from rivals import distributed, hugging_face, loaders, safetensors_, shardsave_, torch_save

TOOLS = {
    tool.name: tool
    for module in (shardsave_, torch_save, safetensors_, hugging_face, distributed, loaders)
    for tool in module.TOOLS
}

#: Tools that are not measured → the reason.
NOT_RUN = {
    "tensorizer": "not installed: pip was still trying versions of its dependency boto3 after three minutes",
    "torchstore": "not installed: it depends on torch==2.9.0",
    "bytecheckpoint": "not installed: it depends on torch<=2.5.0",
}
