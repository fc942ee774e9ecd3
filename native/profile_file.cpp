#include "profile_file.h"

#include <ggml-cpp.h>
#include <ggml.h>
#include <gguf.h>

#include <cmath>
#include <memory>

#include "profile.h"
#include "status.h"

struct fasa_profile_file {
    fasa::ProfileFile file;
};

namespace fasa {

namespace {

// What ggml's reader says about a bad file would stand beside our sentence.
class Quiet {
  public:
    Quiet() {
        ggml_log_get(&callback_, &user_);
        ggml_log_set([](ggml_log_level, const char *, void *) {}, nullptr);
    }
    ~Quiet() { ggml_log_set(callback_, user_); }
    Quiet(const Quiet &)             = delete;
    Quiet & operator=(const Quiet &) = delete;

  private:
    ggml_log_callback callback_ = nullptr;
    void *            user_     = nullptr;
};

// Typed access to the keys, with a sentence for missing and wrong ones.
class Keys {
  public:
    explicit Keys(const std::string & path) : path_(path) {
        const Quiet            quiet;
        const gguf_init_params params = {/*.no_alloc =*/true, /*.ctx =*/nullptr};
        file_.reset(gguf_init_from_file(path.c_str(), params));
        if (file_ == nullptr) {
            fail(FASA_STATUS_ARGUMENT,
                 "The profile %s cannot be read: it is missing, or no GGUF file, or damaged; check the path, or make "
                 "it with: pyfasa calibrate MODEL.",
                 path.c_str());
        }
    }

    bool has(const std::string & key) const { return gguf_find_key(file_.get(), key.c_str()) >= 0; }

    int64_t whole(const std::string & key, int64_t low, int64_t high) const {
        const int64_t id = find(key);
        int64_t       x  = 0;
        switch (gguf_get_kv_type(file_.get(), id)) {
            case GGUF_TYPE_UINT8: x = gguf_get_val_u8(file_.get(), id); break;
            case GGUF_TYPE_INT8: x = static_cast<int>(gguf_get_val_i8(file_.get(), id)); break;
            case GGUF_TYPE_UINT16: x = gguf_get_val_u16(file_.get(), id); break;
            case GGUF_TYPE_INT16: x = gguf_get_val_i16(file_.get(), id); break;
            case GGUF_TYPE_UINT32: x = gguf_get_val_u32(file_.get(), id); break;
            case GGUF_TYPE_INT32: x = gguf_get_val_i32(file_.get(), id); break;
            case GGUF_TYPE_UINT64:
                x = static_cast<int64_t>(gguf_get_val_u64(file_.get(), id)); // too large becomes negative: out of range
                break;
            case GGUF_TYPE_INT64: x = gguf_get_val_i64(file_.get(), id); break;
            default: wrong(key, "a whole number");
        }
        if (x < low || x > high) {
            fail(FASA_STATUS_ARGUMENT, "%s: %s is %lld; it must be from %lld to %lld, so the file is damaged.",
                 path_.c_str(), key.c_str(), static_cast<long long>(x), static_cast<long long>(low),
                 static_cast<long long>(high));
        }
        return x;
    }

    int32_t number(const std::string & key, int32_t low, int32_t high) const {
        return static_cast<int32_t>(whole(key, low, high));
    }

    double real(const std::string & key) const {
        const int64_t id   = find(key);
        const auto    type = gguf_get_kv_type(file_.get(), id);
        if (type != GGUF_TYPE_FLOAT64 && type != GGUF_TYPE_FLOAT32) {
            wrong(key, "a number");
        }
        return type == GGUF_TYPE_FLOAT64 ? gguf_get_val_f64(file_.get(), id)
                                         : static_cast<double>(gguf_get_val_f32(file_.get(), id));
    }

    std::string text(const std::string & key) const {
        const int64_t id = find(key);
        if (gguf_get_kv_type(file_.get(), id) != GGUF_TYPE_STRING) {
            wrong(key, "a text");
        }
        return gguf_get_val_str(file_.get(), id);
    }

    template <typename T> std::vector<T> array(const std::string & key, gguf_type type, size_t n) const {
        const int64_t id = find(key);
        if (gguf_get_kv_type(file_.get(), id) != GGUF_TYPE_ARRAY || gguf_get_arr_type(file_.get(), id) != type ||
            gguf_get_arr_n(file_.get(), id) != n) {
            wrong(key, "an array of " + std::to_string(n) + " values of type " + gguf_type_name(type));
        }
        const auto * first = static_cast<const T *>(gguf_get_arr_data(file_.get(), id));
        return std::vector<T>(first, first + n);
    }

  private:
    int64_t find(const std::string & key) const {
        const int64_t id = gguf_find_key(file_.get(), key.c_str());
        if (id < 0) {
            fail(FASA_STATUS_ARGUMENT, "%s: %s is missing; the file is damaged.", path_.c_str(), key.c_str());
        }
        return id;
    }

    [[noreturn]] void wrong(const std::string & key, const std::string & wanted) const {
        fail(FASA_STATUS_ARGUMENT, "%s: %s is not %s; the file is damaged.", path_.c_str(), key.c_str(),
             wanted.c_str());
    }

    std::string      path_;
    gguf_context_ptr file_;
};

} // namespace

ProfileFile::ProfileFile(const std::string & path) {
    const Keys keys(path);
    if (!keys.has("pyfasa.version")) {
        fail(FASA_STATUS_ARGUMENT,
             "%s holds no pyfasa profile; make one with: pyfasa calibrate MODEL, or give the model's -fasa.gguf file.",
             path.c_str());
    }
    const int64_t version = keys.whole("pyfasa.version", 1, INT64_MAX);
    if (version > FASA_PROFILE_VERSION) {
        fail(FASA_STATUS_ARGUMENT,
             "%s: the profile has version %lld, and this pyfasa knows 1 to %d; update pyfasa, or calibrate again.",
             path.c_str(), static_cast<long long>(version), FASA_PROFILE_VERSION);
    }
    name                   = keys.text("pyfasa.model.name");
    model.n_layer          = keys.number("pyfasa.model.n_layer", 1, UINT16_MAX);
    model.n_head           = keys.number("pyfasa.model.n_head", 1, UINT16_MAX);
    model.n_head_kv        = keys.number("pyfasa.model.n_head_kv", 1, UINT16_MAX);
    model.head_dim         = keys.number("pyfasa.model.head_dim", 2, FASA_MAX_HEAD_DIM);
    model.n_rot            = keys.number("pyfasa.model.n_rot", 2, model.head_dim);
    model.rope_freq_base   = keys.real("pyfasa.model.rope_freq_base");
    const std::string rope = keys.text("pyfasa.model.rope");
    if (rope != "norm" && rope != "neox") {
        fail(FASA_STATUS_ARGUMENT, "%s: pyfasa.model.rope is '%s'; it must be 'norm' or 'neox'.", path.c_str(),
             rope.c_str());
    }
    model.rope = rope == "neox" ? FASA_ROPE_NEOX : FASA_ROPE_NORM;

    const int32_t n_ranked = keys.number("pyfasa.n_ranked", 1, FASA_MAX_HEAD_DIM / 2);
    n_fc                   = keys.number("pyfasa.n_fc", 1, n_ranked);
    const size_t n_row     = static_cast<size_t>(model.n_layer) * model.n_head_kv;
    chunks                 = keys.array<uint16_t>("pyfasa.chunks", GGUF_TYPE_UINT16, n_row * n_ranked);
    bits                   = keys.array<uint8_t>("pyfasa.bits", GGUF_TYPE_UINT8, n_row * n_ranked);
    if (keys.has("pyfasa.center")) {
        center = keys.array<float>("pyfasa.center", GGUF_TYPE_FLOAT32, n_row * model.head_dim);
    }
    if (keys.has("pyfasa.scale")) {
        scale = keys.array<float>("pyfasa.scale", GGUF_TYPE_FLOAT32, n_row * model.head_dim);
    }
    profile = {model.n_layer,
               model.n_head_kv,
               model.head_dim,
               model.n_rot,
               model.rope,
               n_ranked,
               chunks.data(),
               bits.data(),
               center.empty() ? nullptr : center.data(),
               scale.empty() ? nullptr : scale.data()};
    try {
        const Profile checked(profile);
    } catch (const Failure & e) {
        fail(FASA_STATUS_ARGUMENT, "%s: %s", path.c_str(), e.what());
    }
}

} // namespace fasa

fasa_status fasa_profile_file_open(const char * path, fasa_profile_file ** out) {
    return fasa::guarded([&] { *out = new fasa_profile_file{fasa::ProfileFile(path)}; });
}

const fasa_profile * fasa_profile_file_profile(const fasa_profile_file * file) { return &file->file.profile; }

const fasa_model * fasa_profile_file_model(const fasa_profile_file * file) { return &file->file.model; }

const char * fasa_profile_file_name(const fasa_profile_file * file) { return file->file.name.c_str(); }

int32_t fasa_profile_file_n_fc(const fasa_profile_file * file) { return file->file.n_fc; }

void fasa_profile_file_free(fasa_profile_file * file) { delete file; }
