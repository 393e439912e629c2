/* llama.cpp's routing, told to specMoE from its evaluation callback. NOT RUN against llama.cpp: it is compiled, and called
 * with made-up tensors, by tests/contract/test_c_llama.py. README.md tells what to add to a program.
 *
 * llama_decode -> ggml_backend_sched -> moe_listen -> specmoe_route; specmoe_latest -> prefetch
 *
 * Names and shapes are those of ggml-org/llama.cpp: build_moe_ffn in src/llama-graph.cpp at commit 00395eb285c7, the
 * callback in ggml/include/ggml-backend.h at commit 078687311191. There, for layer il and n tokens of a micro-batch,
 *
 *     ffn_moe_topk-<il>             i32 [K, n]      the routed experts: a view of rows as long as there are experts
 *     ffn_moe_weights-<il>          f32 [1, K, n]   the router's probabilities of them
 *     ffn_moe_weights_softmax-<il>  f32 [1, K, n]   where the softmax comes after the choice, as in gpt-oss: the gates
 *
 * il counts all layers of the model, specMoE those with experts: `first_layer` is the number of dense ones before.
 */
#include "specmoe.h"

#include "ggml-backend.h"
#include "ggml.h"

enum { MOE_MOST_EXPERTS = 64 };

/* One sequence that is decoded token by token. */
typedef struct moe_listener {
    specmoe_stream *stream;
    uint32_t sequence;
    int first_layer;     /* dense layers before the first one with experts: 0 for gpt-oss, 1 for DeepSeek-V2-Lite */
    const char *weights; /* "ffn_moe_weights", or "ffn_moe_weights_softmax" for gpt-oss */
    /* What is to be fetched; called after each layer where a forecast is there. May be NULL. */
    void (*prefetch)(const specmoe_forecast *forecast, void *user_data);
    void *user_data;
    int in_token, layer; /* whether a token was started; the layer whose experts are in `experts` */
    int32_t experts[MOE_MOST_EXPERTS];
    float gates[MOE_MOST_EXPERTS];
    int result; /* the last error of specMoE, SPECMOE_OK where there was none: decoding goes on in any case */
} moe_listener;

/* The layer where `name` is exactly <prefix>-<number>, else -1: "ffn_moe_weights-3 (reshaped)" is something else. */
static inline int moe_layer_of(const char *name, const char *prefix) {
    size_t bytes = strlen(prefix);
    char *end;
    long layer;
    if (strncmp(name, prefix, bytes) || name[bytes] != '-' || name[bytes + 1] < '0' || name[bytes + 1] > '9') return -1;
    layer = strtol(name + bytes + 1, &end, 10);
    return *end || layer > 65535 ? -1 : (int)layer;
}

/* A ggml_backend_sched_eval_callback. ask: whether the tensor is wanted; then it comes again, computed. */
static inline bool moe_listen(struct ggml_tensor *tensor, bool ask, void *user_data) {
    moe_listener *listener = (moe_listener *)user_data;
    int chosen = moe_layer_of(tensor->name, "ffn_moe_topk"), weighed = moe_layer_of(tensor->name, listener->weights);
    int64_t top_k = specmoe_status_of(listener->stream)->top_k;
    specmoe_forecast forecast;
    if (ask) return listener->in_token && (chosen >= 0 || weighed >= 0);
    /* Prompts come many tokens at a time, a warm-up with all experts: neither is told. */
    if (!listener->in_token || top_k > MOE_MOST_EXPERTS) return true;
    if (chosen >= 0 && tensor->ne[0] == top_k && tensor->ne[1] == 1) {
        ggml_backend_tensor_get(tensor, listener->experts, 0, (size_t)top_k * sizeof(int32_t));
        listener->layer = chosen;
    } else if (weighed >= 0 && weighed == listener->layer && tensor->ne[1] == top_k && tensor->ne[2] == 1) {
        ggml_backend_tensor_get(tensor, listener->gates, 0, (size_t)top_k * sizeof(float));
        listener->layer = -1;
        listener->result =
            specmoe_route(listener->stream, &listener->sequence, 1, 1, listener->experts, listener->gates);
        if (weighed - listener->first_layer == specmoe_status_of(listener->stream)->num_layers - 1) {
            listener->in_token = 0;
        } else if (listener->result == SPECMOE_OK) {
            int found = specmoe_latest(listener->stream, listener->sequence, &forecast);
            if (found == 1 && listener->prefetch) listener->prefetch(&forecast, listener->user_data);
            if (found < 0) listener->result = found;
        }
        if (listener->result < 0) listener->in_token = 0; /* no more of this token; specmoe_error says why */
    }
    return true; /* false would end the computation */
}

/* Before llama_decode of one token. Gives what specmoe_start does. */
static inline int moe_before_decode(moe_listener *listener, int32_t token_id) {
    listener->layer = -1;
    listener->result = specmoe_start(listener->stream, &listener->sequence, 1, &token_id);
    listener->in_token = listener->result == SPECMOE_OK;
    return listener->result;
}

/* After it, whatever came of it: a token of which not all layers were told is forgotten. */
static inline void moe_after_decode(moe_listener *listener) {
    if (!listener->in_token && listener->result == SPECMOE_OK) return;
    listener->in_token = 0;
    specmoe_end(listener->stream, &listener->sequence, 1);
}
