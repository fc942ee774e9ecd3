// A profile as it stands in a GGUF file, read with ggml's own reader. pyfasa/profile.py writes the keys, describes them
// and reads them too; tests/test_profile_file.py holds the two readers together.
#pragma once

#include <string>
#include <vector>

#include "fasa.h"

namespace fasa {

struct ProfileFile {
    std::string           name; // of the model
    fasa_model            model   = {};
    fasa_profile          profile = {}; // points into the arrays below
    int32_t               n_fc    = 0;  // chunks in use by default
    std::vector<uint16_t> chunks;
    std::vector<uint8_t>  bits;
    std::vector<float>    center, scale; // empty: none

    // Throws a Failure with a sentence that names the file and the way out.
    explicit ProfileFile(const std::string & path);
    ProfileFile(const ProfileFile &)             = delete;
    ProfileFile & operator=(const ProfileFile &) = delete;
};

} // namespace fasa
