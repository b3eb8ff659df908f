# find_package(torch_flash_mla REQUIRED): the target torch_flash_mla::torch_flash_mla has the headers, torch, C++20, and links
# the operators. Where this file is:
#
#   python -c "import torch_flash_mla; print(torch_flash_mla.cmake_prefix_path)"
#
# torch comes along, if CMAKE_PREFIX_PATH also names torch.utils.cmake_prefix_path.
get_filename_component(torch_flash_mla_PACKAGE "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(torch_flash_mla_INCLUDE_DIRS "${torch_flash_mla_PACKAGE}/include")

include(CMakeFindDependencyMacro)
find_dependency(Torch)
# The operators use torch's C++ interface: there is a library for each of its series.
string(REGEX REPLACE "^([0-9]+)\\.([0-9]+).*$" "_C_torch\\1\\2.so" _library "${Torch_VERSION}")
set(torch_flash_mla_LIBRARY "${torch_flash_mla_PACKAGE}/${_library}")
if(NOT EXISTS "${torch_flash_mla_LIBRARY}")
  file(GLOB _present RELATIVE "${torch_flash_mla_PACKAGE}" "${torch_flash_mla_PACKAGE}/_C_torch*.so")
  set(torch_flash_mla_FOUND FALSE)
  if(_present)
    string(REPLACE ";" ", " _present "${_present}")
    set(torch_flash_mla_NOT_FOUND_MESSAGE
      "torch_flash_mla has no operators for torch ${Torch_VERSION}: ${_library} is none of ${_present}. Compile it from the \
source archive, in a Python environment with this torch: pip install --no-build-isolation torch_flash_mla-<version>.tar.gz")
  else()
    set(torch_flash_mla_NOT_FOUND_MESSAGE "${torch_flash_mla_LIBRARY} is missing: the operators were not compiled")
  endif()
  return()
endif()

if(NOT TARGET torch_flash_mla::torch_flash_mla)
  add_library(torch_flash_mla::torch_flash_mla INTERFACE IMPORTED)
  set_target_properties(torch_flash_mla::torch_flash_mla PROPERTIES
    INTERFACE_INCLUDE_DIRECTORIES "${torch_flash_mla_INCLUDE_DIRS}"
    INTERFACE_COMPILE_FEATURES cxx_std_20
    # Nothing refers to a symbol of the library: its operators register themselves when it is loaded. A linker that is told
    # --as-needed would drop it. Having no SONAME, it is remembered by its full path.
    INTERFACE_LINK_LIBRARIES
    "torch;-Wl,--push-state,--no-as-needed,\"${torch_flash_mla_LIBRARY}\",--pop-state")
endif()
