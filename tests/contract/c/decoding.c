/* llama.cpp's part, made up: computes tensors named and shaped as its own, and has the callback hear of them.
 *
 * Arguments: address, model. Standard input: L, K, E, number of dense layers before; then for each token its id, and for each
 * layer K experts and K gates. Output: the forecast at the token's start and after each layer, and how often `prefetch` was called.
 */
#include "llama_cpp_example.c"

enum { MOST = 1024 };

void ggml_backend_tensor_get(const struct ggml_tensor *tensor, void *data, size_t offset, size_t size) {
    memcpy(data, (const char *)tensor->data + offset, size);
}

static void prefetch(const specmoe_forecast *forecast, void *user_data) {
    if (forecast->layers) ++*(int *)user_data;
}

/* The forecast that is as new as what was told, in a line; it is there for the next layer's callback, too. */
static void print_newest(moe_listener *listener) {
    int i;
    specmoe_forecast newest;
    if (specmoe_wait(listener->stream, listener->sequence, 10000000, &newest) != 1) exit(3);
    printf("%d", newest.first_layer);
    for (i = 0; i < newest.width; i++) printf(" %d", newest.experts[i]);
    puts("");
}

static void computed(ggml_backend_sched_eval_callback callback, void *user_data, const char *name, int layer, int64_t first,
                     int64_t second, int64_t third, void *data) {
    struct ggml_tensor tensor;
    memset(&tensor, 0, sizeof tensor);
    tensor.ne[0] = first;
    tensor.ne[1] = second;
    tensor.ne[2] = third;
    tensor.ne[3] = 1;
    tensor.data = data;
    snprintf(tensor.name, sizeof tensor.name, name, layer);
    if (callback(&tensor, true, user_data) && !callback(&tensor, false, user_data)) exit(4);
}

int main(int argc, char **argv) {
    char error[700];
    int layers, top_k, experts, dense, token, layer, i, prefetched = 0;
    specmoe_options options = specmoe_defaults(argv[1], argv[argc - 1]);
    specmoe_stream *stream = specmoe_open(&options, error, sizeof error);
    moe_listener listener = {stream, 5, 0, "ffn_moe_weights", prefetch, &prefetched, 0, -1, {0}, {0}, 0};
    if (!stream || specmoe_open_sequences(stream, &listener.sequence, 1)) return 1;
    if (scanf("%d %d %d %d", &layers, &top_k, &experts, &dense) != 4 || experts > MOST) return 2;
    listener.first_layer = dense;
    while (scanf("%d", &token) == 1) {
        static int32_t ids[MOST];
        static float gates[MOST], odd[MOST];
        computed(moe_listen, &listener, "ffn_moe_topk-%d", dense, top_k, 7, 1, ids); /* a prompt: nothing was started */
        if (moe_before_decode(&listener, token)) return 3;
        print_newest(&listener);
        for (layer = 0; layer < layers; layer++) {
            for (i = 0; i < top_k; i++)
                if (scanf("%d", &ids[i]) != 1) return 2;
            for (i = 0; i < top_k; i++)
                if (scanf("%f", &gates[i]) != 1) return 2;
            computed(moe_listen, &listener, "ffn_moe_logits-%d", dense + layer, experts, 1, 1, odd);
            computed(moe_listen, &listener, "ffn_moe_argsort-%d", dense + layer, experts, 1, 1, odd);
            computed(moe_listen, &listener, "ffn_moe_topk-%d", dense + layer, top_k, 1, 1, ids);
            computed(moe_listen, &listener, "ffn_moe_weights-%d", dense + layer, 1, top_k, 1, gates);
            computed(moe_listen, &listener, "ffn_moe_weights-%d (reshaped)", dense + layer, top_k, 1, 1, odd);
            computed(moe_listen, &listener, "ffn_moe_weights_norm-%d", dense + layer, top_k, 1, 1, odd);
            if (layer < layers - 1) print_newest(&listener);
        }
        moe_after_decode(&listener);
        if (listener.result) return 5;
    }
    printf("prefetched %d times\n", prefetched);
    specmoe_close(stream);
    return 0;
}
