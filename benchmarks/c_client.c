/* The C client's turns in benchmarks/c_client.py: for each number of tokens on standard input, two times a layer.
 *
 * Arguments: address, model. Output for each line of input: the microseconds of specmoe_route and of the whole step, for every layer
 * that a forecast follows, then "over".
 */
#include "specmoe.h"

enum { MOST_EXPERTS = 64 };

static double now_us(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (double)now.tv_sec * 1e6 + (double)now.tv_nsec / 1e3;
}

int main(int argc, char **argv) {
    const uint32_t sequence = 0;
    char error[512];
    int tokens, token, layer, i;
    uint32_t random = 1;
    specmoe_options options = specmoe_defaults(argv[1], argv[argc - 1]);
    specmoe_stream *stream = specmoe_open(&options, error, sizeof error);
    if (!stream) return fprintf(stderr, "%s\n", error), 1;
    const specmoe_status *status = specmoe_status_of(stream);
    if (specmoe_open_sequences(stream, &sequence, 1)) return 1;
    while (scanf("%d", &tokens) == 1) {
        for (token = 0; token < tokens; token++) {
            const int32_t token_id = token % 1000;
            specmoe_forecast forecast;
            if (specmoe_start(stream, &sequence, 1, &token_id)) break;
            if (specmoe_wait(stream, sequence, 1000000, &forecast) != 1) break;
            for (layer = 0; layer < status->num_layers; layer++) {
                int32_t experts[MOST_EXPERTS];
                float gates[MOST_EXPERTS];
                double began_us, told_us;
                random = random * 1664525u + 1013904223u;
                for (i = 0; i < status->top_k; i++) {
                    experts[i] = (int32_t)((random >> 16) + (uint32_t)i * 7u) % status->num_experts;
                    gates[i] = 1.0f / (float)(i + 1);
                }
                began_us = now_us();
                if (specmoe_route(stream, &sequence, 1, 1, experts, gates)) break;
                told_us = now_us();
                if (layer == status->num_layers - 1) continue;
                if (specmoe_wait(stream, sequence, 1000000, &forecast) != 1) break;
                printf("%.2f %.2f\n", told_us - began_us, now_us() - began_us);
            }
            if (layer < status->num_layers) break;
        }
        if (token < tokens) return fprintf(stderr, "no forecast: %s\n", specmoe_error(stream)), 1;
        puts("over");
        fflush(stdout);
    }
    specmoe_close(stream);
    return 0;
}
