# find_package(torch_flash_mla REQUIRED): the target torch_flash_mla::torch_flash_mla has the headers, torch, C++20, and links
# the operators. Where this file is:
#
#   python -c "import torch_flash_mla; print(torch_flash_mla.cmake_prefix_path)"
#
# torch comes along, if CMAKE_PREFIX_PATH also names torch.utils.cmake_prefix_path.
get_filename_component(torch_flash_mla_PACKAGE "${CMAKE_CURRENT_LIST_DIR}/../../.." ABSOLUTE)
set(torch_flash_mla_LIBRARY "${torch_flash_mla_PACKAGE}/_C.so")
set(torch_flash_mla_INCLUDE_DIRS "${torch_flash_mla_PACKAGE}/include")

if(NOT EXISTS "${torch_flash_mla_LIBRARY}")
  set(torch_flash_mla_FOUND FALSE)
  set(torch_flash_mla_NOT_FOUND_MESSAGE "${torch_flash_mla_LIBRARY} is missing: the operators were not compiled")
  return()
endif()

include(CMakeFindDependencyMacro)
find_dependency(Torch)
file(STRINGS "${torch_flash_mla_PACKAGE}/__init__.py" torch_flash_mla_TORCH REGEX "^SUPPORTED_TORCH = ")
string(REGEX REPLACE "^SUPPORTED_TORCH = \"(.*)\"$" "\\1" torch_flash_mla_TORCH "${torch_flash_mla_TORCH}")
if(NOT "${Torch_VERSION}." MATCHES "^${torch_flash_mla_TORCH}\\.")
  set(torch_flash_mla_FOUND FALSE)
  set(torch_flash_mla_NOT_FOUND_MESSAGE
    "torch_flash_mla is built for torch ${torch_flash_mla_TORCH}.*, but torch ${Torch_VERSION} was found")
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
