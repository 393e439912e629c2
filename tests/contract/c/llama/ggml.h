/* As much of llama.cpp's ggml.h as clients/c/llama_cpp_example.c uses, written for this test alone. */
#pragma once
#include <stdbool.h>
#include <stddef.h>
#include <stdint.h>

struct ggml_tensor {
    int64_t ne[4];
    size_t nb[4];
    void *data;
    char name[64];
};
