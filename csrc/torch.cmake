# The target medcl_torch: torch's stable ABI. Only torch's folder is needed: it is never imported, nor found as a
# package.
set(MEDCL_TORCH_DIR "" CACHE PATH "folder of the torch package (holds include/ and lib/)")
if(NOT MEDCL_TORCH_DIR)
  find_package(Python 3 REQUIRED COMPONENTS Interpreter)
  execute_process(
    COMMAND ${Python_EXECUTABLE} -c "import importlib.util as u; print(list(u.find_spec('torch').submodule_search_locations)[0], end='')"
    OUTPUT_VARIABLE MEDCL_TORCH_DIR COMMAND_ERROR_IS_FATAL ANY)
endif()
if(NOT EXISTS "${MEDCL_TORCH_DIR}/include/torch/csrc/stable/library.h")
  message(FATAL_ERROR "no torch stable-ABI headers under '${MEDCL_TORCH_DIR}' (torch >= 2.10 is needed)")
endif()
add_library(medcl_torch INTERFACE)
target_include_directories(medcl_torch SYSTEM INTERFACE "${MEDCL_TORCH_DIR}/include")
# 2.10 is the oldest libtorch this binary loads into
target_compile_definitions(medcl_torch INTERFACE TORCH_TARGET_VERSION=0x020a000000000000)
target_link_directories(medcl_torch INTERFACE "${MEDCL_TORCH_DIR}/lib")
# libtorch.so itself must stay NEEDED: it is what brings libtorch_cuda.so into scope at run time
target_link_libraries(medcl_torch INTERFACE "-Wl,--no-as-needed" torch "-Wl,--as-needed" torch_cpu)
