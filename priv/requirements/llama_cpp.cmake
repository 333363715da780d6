# Read by the CMake project of llama-cpp-python (CMAKE_PROJECT_llama_cpp_INCLUDE). That project has the
# common code of llama.cpp's programs built, by an entry of the cache, and uses none of it: a
# variable comes before the cache.
set(LLAMA_BUILD_COMMON OFF)
