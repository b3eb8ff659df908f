// schemas.cpp: what the operators of torch_flash_mla look like to a libtorch without Python. Loads
// the library that is named and prints the schema of each of its operators, one a line.
#include <ATen/core/dispatch/Dispatcher.h>
#include <dlfcn.h>

#include <algorithm>
#include <cstdio>
#include <sstream>
#include <string>
#include <vector>

int main(int, char** arguments) {
  // RTLD_NOW: a symbol that this libtorch lacks is found here.
  if (dlopen(arguments[1], RTLD_NOW) == nullptr) {
    std::printf("%s\n", dlerror());
    return 1;
  }
  std::vector<std::string> schemas;
  auto& dispatcher = c10::Dispatcher::singleton();
  for (const c10::OperatorName& name : dispatcher.getAllOpNames()) {
    if (name.name.rfind("flashmla::", 0) != 0) continue;
    std::ostringstream schema;
    schema << dispatcher.findSchemaOrThrow(name.name.c_str(), name.overload_name.c_str()).schema();
    schemas.push_back(schema.str());
  }
  std::sort(schemas.begin(), schemas.end());
  for (const std::string& schema : schemas) std::printf("%s\n", schema.c_str());
}
