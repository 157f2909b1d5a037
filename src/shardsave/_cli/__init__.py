"""The command line: ``shardsave …`` and ``python -m shardsave``. Nothing of it is imported by the package itself."""
