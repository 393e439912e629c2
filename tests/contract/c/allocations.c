/* How often memory is taken between opening and closing: linked with --wrap, which leads here.
 *
 * Arguments: address, model.
 */
#include "specmoe.h"

static long taken = 0;
void *__real_malloc(size_t bytes);
void *__real_calloc(size_t count, size_t bytes);
void *__real_realloc(void *old, size_t bytes);
void *__wrap_malloc(size_t bytes) { return taken++, __real_malloc(bytes); }
void *__wrap_calloc(size_t count, size_t bytes) { return taken++, __real_calloc(count, bytes); }
void *__wrap_realloc(void *old, size_t bytes) { return taken++, __real_realloc(old, bytes); }

int main(int argc, char **argv) {
    const uint32_t sequences[2] = {0, 1};
    char error[512];
    int32_t experts[2][64];
    long before, token, layer, i;
    specmoe_forecast forecast;
    specmoe_options options = specmoe_defaults(argv[1], argv[argc - 1]);
    specmoe_stream *stream = specmoe_open(&options, error, sizeof error);
    if (!stream) return 1;
    for (i = 0; i < 64; i++) experts[0][i] = experts[1][i] = (int32_t)i;
    before = taken;
    for (token = 0; token < 300; token++) { /* more than a reserve of random masks holds */
        if (specmoe_open_sequences(stream, sequences, 2) || specmoe_start(stream, sequences, 2, NULL)) return 2;
        for (layer = 0; layer < specmoe_status_of(stream)->num_layers - 1; layer++)
            if (specmoe_wait(stream, 1, 10000000, &forecast) != 1 || specmoe_latest(stream, 0, &forecast) < 0 ||
                specmoe_route(stream, sequences, 2, 1, experts[0], NULL))
                return 3;
        if (specmoe_end(stream, sequences, 2) || specmoe_close_sequences(stream, sequences, 2)) return 4;
    }
    printf("%ld before, %ld then\n", before, taken - before);
    specmoe_close(stream);
    return 0;
}
