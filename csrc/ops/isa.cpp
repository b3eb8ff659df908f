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
  if (force_isa(std::string(name).c_str())) return;
  std::string available;
  for (const std::string& known : isas()) available += (available.empty() ? "" : ", ") + known;
  TORCH_CHECK_VALUE(false, "name: \"", name,
                    "\" is no instruction set that this build and machine can run, expected ",
                    available);
}

}  // namespace flashmla
