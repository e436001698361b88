#pragma once

namespace flowfast {

void test_pieces();
void test_driver();

}  // namespace flowfast
