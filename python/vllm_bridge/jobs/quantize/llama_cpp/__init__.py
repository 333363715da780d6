"""What GGUF files are made with: llama.cpp, by llama-cpp-python and ctypes, and its converter."""
