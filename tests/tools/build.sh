#!/bin/sh
# Builds the stock tools of the llama.cpp inside the pinned llama-cpp-python, once, for `make test-tools`.
#   build.sh PIP CMAKE NINJA REQUIREMENT FOLDER
# They are left in FOLDER/bin.
set -eu
pip=$1 cmake=$2 ninja=$3 requirement=$4 folder=$5
jobs=${JOBS:-$(nproc)}

mkdir -p "$folder"
cd "$folder"
if [ ! -d source ]; then
    "$pip" download --quiet --no-binary :all: --no-deps --no-build-isolation "$requirement"
    rm -rf unpacked
    mkdir unpacked
    tar -xzf llama_cpp_python-*.tar.gz -C unpacked --strip-components=1
    mv unpacked/vendor/llama.cpp source
    rm -rf unpacked llama_cpp_python-*.tar.gz
fi

# As the published builds are made: backends are loaded at run time, and only then does every tool read
# GGML_BACKEND_PATH. Such a build has no GGML_NATIVE; these flags are what it would set.
flags=
if [ "$(uname -m)" = x86_64 ]; then
    flags="-march=native -mno-amx-tile -mno-amx-int8 -mno-amx-bf16" # see NO_AMX in the Makefile
fi
"$cmake" -S source -B build -G Ninja -DCMAKE_MAKE_PROGRAM="$ninja" -DCMAKE_BUILD_TYPE=Release \
    -DCMAKE_C_FLAGS="$flags" -DCMAKE_CXX_FLAGS="$flags" \
    -DBUILD_SHARED_LIBS=ON -DGGML_BACKEND_DL=ON -DGGML_NATIVE=OFF -DGGML_RPC=ON -DLLAMA_OPENSSL=OFF \
    -DLLAMA_BUILD_UI=OFF -DLLAMA_USE_PREBUILT_UI=OFF -DLLAMA_BUILD_TESTS=OFF -DLLAMA_BUILD_EXAMPLES=OFF > /dev/null
"$cmake" --build build -j "$jobs" --target ggml-cpu ggml-rpc ggml-rpc-server llama-bench llama-cli llama-completion \
    llama-perplexity llama-server
ln -sfn build/bin bin
