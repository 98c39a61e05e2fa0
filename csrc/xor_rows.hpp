// answers[q] = the XOR of the rows c of table with bit c of bits[q] set, for q = 0, 1, ..., Q - 1.
//
// table (C, D) of any type, whose rows' elements lie side by side; bits (Q, ceil(C / 8)) uint8, where bit c of a row is
// bit c % 8, from the lowest, of its byte c / 8, and those behind the last row of the table count for nothing; answers
// (Q, D) of the table's type, one row after the other. XOR is of the elements' bits, so that order does not matter: the
// same for any number of threads and any instruction set.
#pragma once

#include "tensor_view.hpp"

namespace fedss {

struct BitVectors {
  const uint8_t* data = nullptr;
  int64_t rows = 0, row_stride = 0;  // in bytes
};

void xor_rows(const Matrix& table, const BitVectors& bits, void* answers, int threads);

}  // namespace fedss
