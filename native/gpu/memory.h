// Device memory and streams with owners; failures are exceptions that the decorator turns into dense decoding.
#pragma once

#include <memory>
#include <new>

#include "../cuda/api.h"
#include "../memory.h"
#include "../status.h"

namespace fasa::gpu {

inline void check(const Api * api, int32_t error, const char * what) {
    if (error != 0) {
        fail(FASA_STATUS_STATE, "CUDA failed to %s: %s.", what, api->error_text(error));
    }
}

class Stream { // a device as its stream
  public:
    Stream(const Api * api, const void * memory) : api_(api) {
        check(api, api->open(memory, &device_), "open a stream");
    }
    ~Stream() { api_->close(device_); }
    Stream(const Stream &)             = delete;
    Stream & operator=(const Stream &) = delete;

    const Api * api() const { return api_; }
    Device *    device() const { return device_; }

  private:
    const Api * api_;
    Device *    device_ = nullptr;
};

class Pinned { // page-locked memory of the host
  public:
    Pinned()                           = default;
    Pinned(const Pinned &)             = delete;
    Pinned & operator=(const Pinned &) = delete;
    ~Pinned() { release(); }

    uint8_t * get() const { return data_; }

    // At least n bytes; std::bad_alloc when there are none. What it held is lost when it moves.
    void reserve(const std::shared_ptr<Stream> & stream, int64_t n) {
        if (n <= n_) {
            return;
        }
        release();
        void * p = nullptr;
        if (allocation_fails() || stream->api()->allocate_host(stream->device(), static_cast<size_t>(n), &p) != 0) {
            throw std::bad_alloc();
        }
        stream_ = stream, data_ = static_cast<uint8_t *>(p), n_ = n;
    }

  private:
    void release() {
        if (data_ != nullptr) {
            stream_->api()->release_host(stream_->device(), data_);
        }
        data_ = nullptr, n_ = 0;
    }

    std::shared_ptr<Stream> stream_;
    uint8_t *               data_ = nullptr;
    int64_t                 n_    = 0;
};

template <typename T> class Memory {
  public:
    Memory() = default;
    // Zeroed; std::bad_alloc when the device has no room.
    Memory(const std::shared_ptr<Stream> & stream, int64_t n) : stream_(stream), n_(n) {
        void * p = nullptr;
        if (allocation_fails() ||
            stream->api()->allocate(stream->device(), static_cast<size_t>(n > 0 ? n : 1) * sizeof(T), &p) != 0) {
            throw std::bad_alloc();
        }
        data_ = static_cast<T *>(p);
    }
    Memory(Memory && o) noexcept { *this = std::move(o); }
    Memory & operator=(Memory && o) noexcept {
        std::swap(stream_, o.stream_);
        std::swap(data_, o.data_);
        std::swap(n_, o.n_);
        return *this;
    }
    ~Memory() { release(); }

    void release() {
        if (data_ != nullptr) {
            stream_->api()->release(stream_->device(), data_);
        }
        data_ = nullptr;
        n_    = 0;
    }
    T *     get() const { return data_; }
    int64_t size() const { return n_; }

    // At least n; true when the memory moved. What it held is lost.
    bool reserve(const std::shared_ptr<Stream> & stream, int64_t n) {
        if (n <= n_) {
            return false;
        }
        release(); // both at once could be what does not fit
        *this = Memory(stream, n);
        return true;
    }

  private:
    std::shared_ptr<Stream> stream_;
    T *                     data_ = nullptr;
    int64_t                 n_    = 0;
};

} // namespace fasa::gpu
