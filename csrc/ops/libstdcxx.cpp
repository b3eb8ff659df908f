// libstdcxx.cpp: functions that C++20 code takes from libstdc++ and that the one of manylinux_2_28
// lacks (it stops at GLIBCXX_3.4.25). Instantiated here, they are part of this library.
//
// Whether they are called or inlined differs from compiler to compiler and with torch's headers. A
// new one raises the platform in the wheel's name, which tests/test_wheel.py looks at.
#include <sstream>

#if defined(_GLIBCXX_RELEASE) && _GLIBCXX_RELEASE >= 11
template std::string std::stringbuf::str() const&;  // GLIBCXX_3.4.29; by c10::str
#endif
