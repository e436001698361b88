// The seal of an archive file (flowfast/archive/seal.py): what it is and its digest, read before anything in it is loaded.
#pragma once

#include <string>

namespace flowfast {

// The digest of a flowfast archive. Throws ArchiveError unless the file is one, whole, and of this library's format and
// noise stream.
std::string check_seal(const std::string& path);

// BLAKE2b-256 of a whole file, in hexadecimal. Throws ArchiveError where it cannot be read.
std::string digest_of(const std::string& path);

}  // namespace flowfast
