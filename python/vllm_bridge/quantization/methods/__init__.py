"""One quantization method in each file: see ``method.Method``. A file is found by being here."""
