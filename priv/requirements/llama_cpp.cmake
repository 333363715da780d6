# Read by the CMake project of llama-cpp-python (CMAKE_PROJECT_llama_cpp_INCLUDE). That project has the
# common code of llama.cpp's programs built, by an entry of the cache, and uses none of it: a
# variable comes before the cache.
set(LLAMA_BUILD_COMMON OFF)

# On processors with AMX ggml's kernels for it end with SIGILL. Who converts a model has no use for them,
# and what models say is compared with what they say on other processors.
include(CheckCCompilerFlag)
check_c_compiler_flag(-mno-amx-tile CAN_DO_WITHOUT_AMX)
if(CAN_DO_WITHOUT_AMX)
  add_compile_options(-mno-amx-tile -mno-amx-int8 -mno-amx-bf16)
endif()
