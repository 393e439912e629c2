/* A decode loop that replays routing from a file: how many of the routed experts had been forecast?
 *
 *     cc -std=c11 example.c -o example
 *     ./example unix:/run/specmoe.sock gpt-oss-20b 1000 < routing.csv
 *
 * routing.csv has a line for each layer of each token, layers in order, K experts each: token_id,layer,expert,expert,...
 * The third argument is how many microseconds a layer may wait for its forecast; 0: take what is there.
 */
#include "specmoe.h"

enum { MOST_LINE_BYTES = 4096, MOST_EXPERTS = 256 };

/* A line of the file. How many experts it names; 0 where it is no such line. */
static int parse(const char *line, int32_t *token_id, int *layer, int32_t *experts) {
    int count = 0;
    char *end;
    *token_id = (int32_t)strtol(line, &end, 10);
    if (*end != ',') return 0;
    *layer = (int)strtol(end + 1, &end, 10);
    while (*end == ',' && count < MOST_EXPERTS) experts[count++] = (int32_t)strtol(end + 1, &end, 10);
    return *end == '\n' || *end == '\r' || !*end ? count : 0;
}

/* How many of the K routed experts are in the forecast's row for the layer. */
static int forecast_right(const specmoe_forecast *forecast, int layer, const int32_t *experts, int top_k) {
    int row = layer - forecast->first_layer, right = 0, i, j;
    if (row < 0 || row >= forecast->layers) return 0;
    for (i = 0; i < top_k; i++)
        for (j = 0; j < forecast->sizes[row]; j++)
            if (forecast->experts[row * forecast->width + j] == experts[i]) right++;
    return right;
}

int main(int argc, char **argv) {
    const uint32_t sequence = 0;
    char line[MOST_LINE_BYTES], error[512];
    long routed = 0, right = 0, number = 0;
    int result = SPECMOE_OK;
    if (argc < 3) {
        fprintf(stderr, "usage: %s ADDRESS MODEL [WAIT_US] < routing.csv\n", argv[0]);
        return 2;
    }
    specmoe_options options = specmoe_defaults(argv[1], argv[2]);
    int64_t wait_us = argc > 3 ? strtoll(argv[3], NULL, 10) : 0;
    specmoe_stream *stream = specmoe_open(&options, error, sizeof error);
    if (!stream) {
        fprintf(stderr, "%s\n", error);
        return 1;
    }
    const int top_k = specmoe_status_of(stream)->top_k;
    result = specmoe_open_sequences(stream, &sequence, 1);
    while (result >= 0 && fgets(line, sizeof line, stdin)) {
        int32_t token_id, experts[MOST_EXPERTS];
        int layer = 0;
        specmoe_forecast forecast;
        number++;
        if (parse(line, &token_id, &layer, experts) != top_k) {
            fprintf(stderr, "line %ld: expected token_id,layer and %d experts\n", number, top_k);
            specmoe_close(stream);
            return 1;
        }
        if (layer == 0) result = specmoe_start(stream, &sequence, 1, &token_id);
        /* Here a model server fetches what is forecast for the coming layers and computes this one. */
        if (result >= 0) result = specmoe_wait(stream, sequence, wait_us, &forecast);
        if (result == 1) right += forecast_right(&forecast, layer, experts, top_k);
        routed += top_k;
        if (result >= 0) result = specmoe_route(stream, &sequence, 1, 1, experts, NULL);
    }
    if (result < 0) fprintf(stderr, "line %ld: %s\n", number, specmoe_error(stream));
    printf("%ld of %ld routed experts had been forecast\n", right, routed);
    specmoe_close(stream);
    return result < 0;
}
