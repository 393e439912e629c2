/* The C client's reading alone, without a service: cases on standard input, what came of each on standard output.
 *
 * A case: u32 bytes, u32 step (how many are fed at once), the bytes. Answered by the frames that were read, in hex, then by what
 * a stream that was welcomed (4 layers, top 2 of 8 experts, sequences 0 and 1 within a token) makes of the same bytes.
 * tests/contract/test_c_frames.py feeds it.
 */
#include "specmoe.h"

enum { MOST_MESSAGE_BYTES = 1024 };

static void hex(const uint8_t *data, size_t bytes) {
    size_t i;
    for (i = 0; i < bytes; i++) printf("%02x", data[i]);
}

static void frames_of(const uint8_t *data, size_t bytes, size_t step) {
    static specmoe_frames_ frames;
    uint8_t *message = (uint8_t *)malloc(MOST_MESSAGE_BYTES); /* by itself, so that a byte too many is seen */
    size_t at = 0, most;
    memset(&frames, 0, sizeof frames);
    frames.message = message;
    frames.capacity = MOST_MESSAGE_BYTES;
    while (at < bytes) {
        int event;
        for (most = bytes - at < step ? bytes - at : step; most;) {
            size_t taken = specmoe_frames_take_(&frames, data + at, most, &event);
            at += taken;
            most -= taken;
            if (event == SPECMOE_BROKEN_) {
                printf("broken %s\n", frames.error);
                free(message);
                return;
            }
            if (event == SPECMOE_MORE_) continue;
            printf("%d ", event);
            if (event & 8)
                hex(frames.control, frames.control_bytes);
            else
                hex(frames.message, frames.bytes);
            puts("");
        }
    }
    free(message);
}

static specmoe_stream *welcomed(int descriptor) {
    uint8_t welcome[SPECMOE_WELCOME_BYTES_] = {SPECMOE_WELCOME_, 3};
    uint32_t sequence;
    specmoe_stream *stream = (specmoe_stream *)calloc(1, sizeof *stream);
    stream->options = specmoe_defaults("", "");
    stream->options.max_sequences = 3;
    stream->descriptor = descriptor;
    stream->frames.capacity = SPECMOE_LEAST_MESSAGE_BYTES_;
    stream->frames.message = (uint8_t *)malloc(SPECMOE_LEAST_MESSAGE_BYTES_);
    specmoe_put16_(welcome + 16, 4);
    specmoe_put16_(welcome + 18, 8);
    specmoe_put16_(welcome + 20, 2);
    specmoe_put16_(welcome + 22, 1);
    specmoe_put32_(welcome + 28, 1 << 20);
    if (specmoe_take_welcome_(stream, welcome, sizeof welcome)) exit(3);
    for (sequence = 0; sequence < 2; sequence++)
        if (specmoe_open_sequences(stream, &sequence, 1) || specmoe_start(stream, &sequence, 1, NULL)) exit(3);
    return stream;
}

static void stream_of(const uint8_t *data, size_t bytes, size_t step) {
    int ends[2], result = 0;
    size_t at = 0, part;
    uint32_t sequence;
    specmoe_stream *stream;
    if (socketpair(AF_UNIX, SOCK_STREAM, 0, ends)) exit(3);
    fcntl(ends[0], F_SETFL, O_NONBLOCK);
    stream = welcomed(ends[0]);
    stream->in = (uint8_t *)malloc(SPECMOE_IN_BYTES_);
    for (; at < bytes && !result; at += part) {
        part = bytes - at < step ? bytes - at : step;
        result = specmoe_feed_(stream, data + at, part);
    }
    printf("stream %d%s%s\n", result, result ? " " : "", specmoe_error(stream));
    for (sequence = 0; sequence < 2; sequence++) {
        specmoe_forecast forecast;
        int i, found = specmoe_latest(stream, sequence, &forecast);
        if (found != 1) continue;
        printf("forecast %lu %d of", (unsigned long)sequence, forecast.first_layer);
        for (i = 0; i < forecast.layers; i++) printf(" %d", forecast.sizes[i]);
        putchar(':');
        for (i = 0; i < forecast.layers * forecast.width; i++) printf(" %d:%g", forecast.experts[i], (double)forecast.probabilities[i]);
        puts("");
    }
    specmoe_close(stream);
    close(ends[1]);
}

int main(void) {
    uint8_t head[8];
    while (fread(head, 1, sizeof head, stdin) == sizeof head) {
        size_t bytes = specmoe_get32_(head), step = specmoe_get32_(head + 4);
        uint8_t *data = (uint8_t *)malloc(bytes ? bytes : 1);
        if (!step || fread(data, 1, bytes, stdin) != bytes) return 2;
        frames_of(data, bytes, step);
        stream_of(data, bytes, step);
        puts("over");
        fflush(stdout);
        free(data);
    }
    return 0;
}
