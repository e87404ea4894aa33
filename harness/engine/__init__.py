"""The only package that imports llama_cpp or ctypes. Its functions run in child processes (see `harness.isolate`)."""
