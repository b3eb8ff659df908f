// isa.cpp: which instruction set the kernels use, for torch_flash_mla.cpu_isa(), available_isas()
// and force_isa().
#include <c10/util/Exception.h>

#include "kernels/dispatch.h"
#include "ops/ops.h"

namespace flashmla {

std::string isa() { return isa_name(); }

std::vector<std::string> isas() {
  std::vector<std::string> available;
  for (const char* const* name = isa_names(); *name != nullptr; ++name) {
    if (isa_available(*name)) available.emplace_back(*name);
  }
  return available;
}

void set_isa(std::string_view name) {
  TORCH_CHECK_VALUE(force_isa(std::string(name).c_str()), "name: \"", name,
                    "\" is not an instruction set this machine and build can run; expected one of ",
                    isas());
}

}  // namespace flashmla
