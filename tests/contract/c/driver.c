/* The C client, told what to do on standard input: a command a line, an answer in JSON a line.
 *
 * tests/contract/c_client.py compiles and drives it.
 */
#include "specmoe.h"

#include <sys/resource.h>

enum { MOST_NUMBERS = 1 << 16 };

static long integers(int32_t *into, long most) {
    long count = 0;
    int read = 0;
    char word[32];
    while (count < most && scanf("%31s%n", word, &read) == 1) into[count++] = (int32_t)strtoll(word, NULL, 10);
    return count;
}

static void text(const char *words) {
    putchar('"');
    for (; *words; words++) {
        if (*words == '"' || *words == '\\') putchar('\\');
        putchar(*words);
    }
    putchar('"');
}

static void forecast_of(const specmoe_forecast *forecast) {
    int i, slots = forecast->layers * forecast->width;
    printf(", \"token\": %lu, \"first_layer\": %d, \"layers\": %d, \"width\": %d, \"sizes\": [", (unsigned long)forecast->token,
           forecast->first_layer, forecast->layers, forecast->width);
    for (i = 0; i < forecast->layers; i++) printf("%s%d", i ? ", " : "", forecast->sizes[i]);
    printf("], \"experts\": [");
    for (i = 0; i < slots; i++) printf("%s%d", i ? ", " : "", forecast->experts[i]);
    printf("], \"probabilities\": [");
    for (i = 0; i < slots; i++) printf("%s%.9g", i ? ", " : "", (double)forecast->probabilities[i]);
    printf("]");
}

static void status_of(const specmoe_stream *stream) {
    const specmoe_status *status = specmoe_status_of(stream);
    printf(", \"version\": %lu, \"shape\": [%d, %d, %d], \"uses_token_ids\": %d, \"uses_gates\": %d, \"idle_seconds\": %lu, "
           "\"dropped\": %lu, \"milliseconds_left\": %lld",
           (unsigned long)status->version, status->num_layers, status->num_experts, status->top_k, status->uses_token_ids,
           status->uses_gates, (unsigned long)status->idle_seconds, (unsigned long)status->dropped,
           (long long)status->milliseconds_left);
}

static specmoe_stream *opened(char *error, size_t error_bytes) {
    char address[600] = "", model[2000] = "", version[64] = "";
    int top_n, ahead, every, at_start;
    unsigned long sequences, timeout_ms;
    specmoe_options options = specmoe_defaults(address, model);
    if (scanf("%599s %1999s %63s %d %f %d %d %d %d %lu %lu", address, model, version, &top_n, &options.coverage, &options.adapt, &ahead, &every,
              &at_start, &sequences, &timeout_ms) != 11)
        exit(2);
    options.version = strcmp(version, "-") ? version : NULL;
    options.top_n = (uint16_t)top_n;
    options.ahead = (uint16_t)ahead;
    options.every = (uint16_t)every;
    options.at_start = at_start;
    options.max_sequences = (uint32_t)sequences;
    options.open_timeout_ms = (uint32_t)timeout_ms;
    return specmoe_open(&options, error, error_bytes);
}

/* Open so many files that the next descriptor is none that select can wait for. */
static int crowd(void) {
    struct rlimit files;
    int last = 0;
    getrlimit(RLIMIT_NOFILE, &files);
    files.rlim_cur = files.rlim_max;
    setrlimit(RLIMIT_NOFILE, &files);
    while (last >= 0 && last < (int)FD_SETSIZE) last = dup(0);
    return last;
}

int main(void) {
    static int32_t experts[MOST_NUMBERS], ids[MOST_NUMBERS];
    static uint32_t sequences[MOST_NUMBERS];
    static float gates[MOST_NUMBERS];
    specmoe_stream *stream = NULL;
    char command[32];
    while (scanf("%31s", command) == 1) {
        char error[700] = "";
        specmoe_forecast forecast;
        int result = 0, told = 0;
        long count = 0, i;
        if (!strcmp(command, "crowd")) {
            printf("{\"code\": %d}\n", crowd());
            fflush(stdout);
            continue;
        }
        if (!strcmp(command, "connect")) {
            specmoe_close(stream);
            stream = opened(error, sizeof error);
            printf("{\"code\": %d, \"error\": ", stream ? 0 : SPECMOE_GONE);
            text(error);
            puts("}");
            fflush(stdout);
            continue;
        }
        if (!stream) return 2;
        if (!strcmp(command, "wait") || !strcmp(command, "latest")) {
            unsigned long sequence;
            long long timeout_us;
            if (scanf("%lu %lld", &sequence, &timeout_us) != 2) return 2;
            result = *command == 'w' ? specmoe_wait(stream, (uint32_t)sequence, timeout_us, &forecast)
                                     : specmoe_latest(stream, (uint32_t)sequence, &forecast);
            told = result == 1;
        } else if (!strcmp(command, "poll")) {
            result = specmoe_poll(stream);
        } else if (strcmp(command, "status")) { /* all others name sequences */
            int with = 0, layers = 0;
            if (scanf("%ld", &count) != 1 || count > MOST_NUMBERS) return 2;
            for (i = 0; i < count; i++) {
                unsigned long sequence;
                if (scanf("%lu", &sequence) != 1) return 2;
                sequences[i] = (uint32_t)sequence;
            }
            if (!strcmp(command, "start")) {
                if (scanf("%d", &with) != 1 || (with && integers(ids, count) != count)) return 2;
                result = specmoe_start(stream, sequences, (size_t)count, with ? ids : NULL);
            } else if (!strcmp(command, "route")) {
                long slots;
                if (scanf("%d %d %ld", &with, &layers, &slots) != 3 || slots > MOST_NUMBERS || integers(experts, slots) != slots)
                    return 2;
                for (i = 0; with && i < slots; i++)
                    if (scanf("%f", &gates[i]) != 1) return 2;
                result = specmoe_route(stream, sequences, (size_t)count, layers, experts, with ? gates : NULL);
            } else if (!strcmp(command, "open")) {
                result = specmoe_open_sequences(stream, sequences, (size_t)count);
            } else if (!strcmp(command, "close")) {
                result = specmoe_close_sequences(stream, sequences, (size_t)count);
            } else if (!strcmp(command, "end")) {
                result = specmoe_end(stream, sequences, (size_t)count);
            } else if (!strcmp(command, "ask")) {
                result = specmoe_ask(stream, sequences, (size_t)count);
            } else {
                return 2;
            }
        }
        printf("{\"code\": %d, \"error\": ", result);
        text(result < 0 ? specmoe_error(stream) : "");
        if (told) forecast_of(&forecast);
        if (!strcmp(command, "status")) status_of(stream);
        puts("}");
        fflush(stdout);
    }
    specmoe_close(stream);
    return 0;
}
