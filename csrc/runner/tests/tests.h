#pragma once

namespace flowfast {

void test_pieces();
void test_driver();
void test_engine();
void test_trace(const char* file);

}  // namespace flowfast
