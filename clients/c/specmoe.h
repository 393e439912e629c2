/* specmoe.h: tells a specMoE service routing as it happens, and has its forecasts ready. C11, or C++11.
 *
 * decode loop -> specmoe_start, specmoe_route -> frames -> service -> specmoe_latest, specmoe_wait -> decode loop
 *
 *     cc -std=c11 example.c -o example && ./example unix:/run/specmoe.sock gpt-oss-20b < routing.csv
 *
 * Nothing but libc and POSIX sockets; no thread, no lock: a stream is for one thread at a time. After specmoe_open
 * nothing is allocated, and nothing but specmoe_wait waits. README.md has a table of the functions,
 * docs/stream-protocol.md the bytes. Names that end in _ are this file's own.
 *
 * With -std=c11 (instead of gnu11), include this file before those of the system, or define _POSIX_C_SOURCE 200809L.
 */
#ifndef SPECMOE_H
#define SPECMOE_H

/* -std=c11 hides POSIX. Where nothing is hidden, nothing may be defined: it would hide the rest. */
#if defined(__STRICT_ANSI__) && !defined(_POSIX_C_SOURCE) && !defined(_GNU_SOURCE) && !defined(_DEFAULT_SOURCE)
#define _DEFAULT_SOURCE 1
#endif

#include <errno.h>
#include <fcntl.h>
#include <netdb.h>
#include <netinet/in.h>
#include <netinet/tcp.h>
#include <poll.h>
#include <stdarg.h>
#include <stddef.h>
#include <stdint.h>
#include <stdio.h>
#include <stdlib.h>
#include <string.h>
#include <strings.h>
#include <sys/select.h>
#include <sys/socket.h>
#include <sys/un.h>
#include <time.h>
#include <unistd.h>

#ifdef __cplusplus
extern "C" {
#endif

/* ---- What a program uses ---------------------------------------------------------------------------------------- */

/* What functions return; specmoe_error says it in words. */
enum {
    SPECMOE_OK = 0,
    SPECMOE_INVALID = -1, /* a wrong argument, or out of order: nothing was sent, nothing changed */
    SPECMOE_LOST = -2,    /* the service forgot or refused a sequence: close it, and open it again */
    SPECMOE_GONE = -3     /* the stream is over: close it, and open another */
};

/* What a stream is for. specmoe_defaults fills it in. */
typedef struct specmoe_options {
    const char *address;  /* "unix:/run/specmoe.sock", "http://127.0.0.1:8080" or "127.0.0.1:8080" */
    const char *model;    /* as in /v1/models */
    const char *version;  /* a number or an alias; NULL: the one that is served */
    uint16_t top_n;       /* experts a layer; 0: twice the model's top-k. Must be 0 with coverage */
    float coverage;       /* as many experts as hold all the routed ones with this probability; 0: top_n */
    int adapt;            /* coverage learns from its misses: it holds where routing drifts */
    uint16_t ahead;       /* layers that a forecast covers at most; 0: all that are left */
    uint16_t every;       /* a forecast after every so many layers; 0: none, use specmoe_ask */
    int at_start;         /* a forecast at the start of a token */
    uint32_t deadline_us; /* a forecast that would come later than this is not sent; 0: none */
    uint32_t
        max_sequences; /* sequences are numbered from 0 up to this, at most 65535: what memory is taken for */
    uint32_t
        open_timeout_ms; /* for connecting and the welcome together; a host's name is looked up besides */
} specmoe_options;

/* The model, and how the stream is. */
typedef struct specmoe_status {
    uint32_t version;
    int num_layers, num_experts, top_k;
    int uses_token_ids, uses_gates; /* what is not used need not be told, and is not sent */
    uint32_t idle_seconds;          /* a sequence that was not mentioned for so long is forgotten */
    uint32_t dropped;               /* forecasts that were due and not sent */
    int64_t milliseconds_left; /* what the service said it has left before it stops; -1: it does not stop */
} specmoe_status;

/* What the coming layers of a sequence's token will probably be routed to. Valid until the next call for the stream. */
typedef struct specmoe_forecast {
    uint32_t token;        /* tokens of the sequence that were started before this one */
    int first_layer;       /* layers that had been told when it was made: row j is of layer first_layer + j */
    int layers;            /* rows, m */
    int width;             /* experts in a row, w */
    const uint16_t *sizes; /* [m]: how many experts of a row are meant; what stands behind is filling */
    const uint16_t *experts;    /* [m, w]: best first */
    const float *probabilities; /* [m, w]: that the expert is among the routed top-k */
} specmoe_forecast;

typedef struct specmoe_stream specmoe_stream;

/* Forecasts at the start of a token and after every layer, 64 sequences, 10 s to connect. */
static inline specmoe_options specmoe_defaults(const char *address, const char *model);

/* Connect and be welcomed. NULL where that fails; `error`, of 1 byte at least, then holds why. */
static inline specmoe_stream *specmoe_open(const specmoe_options *options, char *error, size_t error_bytes);

/* Say so, as far as that takes no time, hang up, free all. NULL is allowed. */
static inline void specmoe_close(specmoe_stream *stream);

/* What went wrong last, in words; "" where nothing has. */
static inline const char *specmoe_error(const specmoe_stream *stream);
static inline const specmoe_status *specmoe_status_of(const specmoe_stream *stream);

/* Sequences that begin, and that end for good. */
static inline int specmoe_open_sequences(specmoe_stream *stream, const uint32_t *sequences, size_t count);
static inline int specmoe_close_sequences(specmoe_stream *stream, const uint32_t *sequences, size_t count);

/* A token of each sequence begins. token_ids [count], of the model's own tokenizer, -1: unknown; NULL: all are. */
static inline int specmoe_start(specmoe_stream *stream, const uint32_t *sequences, size_t count,
                                const int32_t *token_ids);

/* The next `layers` layers of each were routed: experts, gates [count, layers, K]; gates may be NULL. The sequences are
 * at the same layer. A token's last layer ends it: it becomes history. */
static inline int specmoe_route(specmoe_stream *stream, const uint32_t *sequences, size_t count, int layers,
                                const int32_t *experts, const float *gates);

/* End tokens before their last layer: they are forgotten. */
static inline int specmoe_end(specmoe_stream *stream, const uint32_t *sequences, size_t count);

/* Have a forecast made now. */
static inline int specmoe_ask(specmoe_stream *stream, const uint32_t *sequences, size_t count);

/* Take in what has come, without waiting, and answer pings. To be called every 20 s where nothing else is. */
static inline int specmoe_poll(specmoe_stream *stream);

/* The newest forecast of the sequence's token that has come. 1: here it is; 0: there is none; below 0: an error.
 * Where there is none, `forecast` is all 0: no layers. */
static inline int specmoe_latest(specmoe_stream *stream, uint32_t sequence, specmoe_forecast *forecast);

/* The same, as new as what was told: waits for it up to timeout_us. 0: none was due in this token, or not in time. */
static inline int specmoe_wait(specmoe_stream *stream, uint32_t sequence, int64_t timeout_us,
                               specmoe_forecast *forecast);

/* ---- Frames of RFC 6455 ----------------------------------------------------------------------------------------- */

enum {
    SPECMOE_CONTINUATION_ = 0,
    SPECMOE_TEXT_ = 1,
    SPECMOE_BINARY_ = 2,
    SPECMOE_CLOSE_ = 8,
    SPECMOE_PING_ = 9,
    SPECMOE_PONG_ = 10
};
enum { SPECMOE_MORE_ = 0, SPECMOE_BROKEN_ = -1 }; /* beside the opcodes: what specmoe_frames_take_ gives */
enum { SPECMOE_CONTROL_BYTES_ = 125, SPECMOE_ERROR_BYTES_ = 640 };

/* Frames on their way in. message: of data frames so far, `bytes` of at most `capacity`. */
typedef struct specmoe_frames_ {
    uint8_t *message;
    size_t capacity, bytes;
    uint8_t control[SPECMOE_CONTROL_BYTES_];
    size_t control_bytes;
    uint8_t header[10];
    size_t header_bytes;
    uint64_t left;     /* of the frame's payload */
    int opcode, final; /* of the frame */
    int in_payload;
    int message_opcode; /* of the message in fragments; 0: there is none */
    char error[160];
} specmoe_frames_;

static inline int specmoe_broken_(specmoe_frames_ *frames, const char *what, unsigned long long came,
                                  unsigned long long most) {
    snprintf(frames->error, sizeof frames->error, what, came, most);
    return SPECMOE_BROKEN_;
}

static inline size_t specmoe_header_bytes_(const uint8_t *header) {
    int length = header[1] & 0x7f;
    return length == 127 ? 10 : length == 126 ? 4 : 2;
}

/* A whole header. Nothing of a frame is taken in that would not fit. */
static inline int specmoe_frame_begins_(specmoe_frames_ *frames) {
    const uint8_t *header = frames->header;
    uint64_t length = header[1] & 0x7f;
    size_t i;
    if (frames->header_bytes > 2) {
        length = 0;
        for (i = 2; i < frames->header_bytes; i++) length = length << 8 | header[i];
    }
    frames->opcode = header[0] & 0x0f;
    frames->final = header[0] >> 7;
    if (header[0] & 0x70)
        return specmoe_broken_(frames, "a frame begins with byte %llu: it uses an extension, expected none",
                               header[0], 0);
    if (header[1] & 0x80)
        return specmoe_broken_(frames, "a frame is masked, expected a plain one from a service", 0, 0);
    if (frames->opcode & 8) {
        if (frames->opcode > SPECMOE_PONG_)
            return specmoe_broken_(frames, "a frame has opcode %llu, expected 0 to 2 or 8 to 10",
                                   (unsigned long long)frames->opcode, 0);
        if (!frames->final || length > SPECMOE_CONTROL_BYTES_)
            return specmoe_broken_(frames,
                                   "a control frame is in fragments or has %llu bytes, expected %llu at most",
                                   length, SPECMOE_CONTROL_BYTES_);
        frames->control_bytes = 0;
    } else {
        if (frames->opcode > SPECMOE_BINARY_)
            return specmoe_broken_(frames, "a frame has opcode %llu, expected 0 to 2 or 8 to 10",
                                   (unsigned long long)frames->opcode, 0);
        if ((frames->opcode == SPECMOE_CONTINUATION_) != (frames->message_opcode != 0))
            return specmoe_broken_(frames,
                                   frames->message_opcode
                                       ? "a frame has opcode %llu within a message in fragments, expected 0"
                                       : "a frame has opcode %llu, but there is nothing to continue",
                                   (unsigned long long)frames->opcode, 0);
        if (frames->opcode != SPECMOE_CONTINUATION_) {
            frames->message_opcode = frames->opcode;
            frames->bytes = 0;
        }
        if (length > frames->capacity - frames->bytes)
            return specmoe_broken_(frames, "a message has %llu bytes or more, expected %llu at most",
                                   (unsigned long long)frames->bytes + (length >> 63 ? 0 : length),
                                   frames->capacity);
    }
    frames->left = length;
    frames->in_payload = 1;
    return SPECMOE_MORE_;
}

/* Take in bytes until something is whole. `event`: opcode of a message (`message`) or control frame (`control`) that is,
 * SPECMOE_MORE_ where all bytes are taken and nothing is, SPECMOE_BROKEN_ with `error`. Gives how many were taken. */
static inline size_t specmoe_frames_take_(specmoe_frames_ *frames, const uint8_t *data, size_t bytes,
                                          int *event) {
    size_t taken = 0;
    *event = SPECMOE_MORE_;
    while (taken < bytes) {
        if (!frames->in_payload) {
            frames->header[frames->header_bytes++] = data[taken++];
            if (frames->header_bytes < 2 || frames->header_bytes < specmoe_header_bytes_(frames->header))
                continue;
            *event = specmoe_frame_begins_(frames);
            frames->header_bytes = 0;
            if (*event == SPECMOE_BROKEN_) return taken;
        }
        {
            size_t part = frames->left < bytes - taken ? (size_t)frames->left : bytes - taken;
            uint8_t *into = frames->opcode & 8 ? frames->control + frames->control_bytes
                                               : frames->message + frames->bytes;
            if (part) memcpy(into, data + taken, part);
            *(frames->opcode & 8 ? &frames->control_bytes : &frames->bytes) += part;
            taken += part;
            frames->left -= part;
        }
        if (frames->left) continue;
        frames->in_payload = 0;
        if (frames->opcode & 8) {
            *event = frames->opcode;
            return taken;
        }
        if (frames->final) {
            *event = frames->message_opcode;
            frames->message_opcode = 0;
            return taken;
        }
    }
    return taken;
}

/* ---- Numbers and words ------------------------------------------------------------------------------------------ */

static inline void specmoe_put16_(uint8_t *at, uint32_t value) {
    at[0] = (uint8_t)value;
    at[1] = (uint8_t)(value >> 8);
}

static inline void specmoe_put32_(uint8_t *at, uint32_t value) {
    specmoe_put16_(at, value);
    specmoe_put16_(at + 2, value >> 16);
}

static inline void specmoe_put_float_(uint8_t *at, float value) {
    uint32_t bits;
    memcpy(&bits, &value, 4);
    specmoe_put32_(at, bits);
}

static inline uint16_t specmoe_get16_(const uint8_t *at) { return (uint16_t)(at[0] | at[1] << 8); }

static inline uint32_t specmoe_get32_(const uint8_t *at) {
    return specmoe_get16_(at) | (uint32_t)specmoe_get16_(at + 2) << 16;
}

static inline float specmoe_get_float_(const uint8_t *at) {
    uint32_t bits = specmoe_get32_(at);
    float value;
    memcpy(&value, &bits, 4);
    return value;
}

static inline int64_t specmoe_now_us_(void) {
    struct timespec now;
    clock_gettime(CLOCK_MONOTONIC, &now);
    return (int64_t)now.tv_sec * 1000000 + now.tv_nsec / 1000;
}

/* What came, fit to be printed: whatever is no plain character becomes '?'. */
static inline const char *specmoe_printable_(char *out, size_t out_bytes, const void *data, size_t bytes) {
    const uint8_t *from = (const uint8_t *)data;
    size_t i, most = bytes < out_bytes - 1 ? bytes : out_bytes - 1;
    for (i = 0; i < most; i++) out[i] = from[i] >= 0x20 && from[i] < 0x7f ? (char)from[i] : '?';
    out[most] = 0;
    return out;
}

/* Of FIPS 180-4; RFC 6455 has the service prove with it that it read the request. bytes: at most 119. */
static inline void specmoe_sha1_(const char *text, size_t bytes, uint8_t digest[20]) {
    uint32_t h[5] = {0x67452301u, 0xefcdab89u, 0x98badcfeu, 0x10325476u, 0xc3d2e1f0u}, w[80];
    uint8_t padded[128] = {0};
    size_t blocks = bytes + 9 > 64 ? 2 : 1, block;
    int i;
    memcpy(padded, text, bytes);
    padded[bytes] = 0x80;
    padded[64 * blocks - 2] = (uint8_t)(bytes >> 5);
    padded[64 * blocks - 1] = (uint8_t)(bytes << 3);
    for (block = 0; block < blocks; block++) {
        const uint8_t *at = padded + 64 * block;
        uint32_t a = h[0], b = h[1], c = h[2], d = h[3], e = h[4];
        for (i = 0; i < 16; i++)
            w[i] = (uint32_t)at[4 * i] << 24 | (uint32_t)at[4 * i + 1] << 16 | (uint32_t)at[4 * i + 2] << 8 |
                   at[4 * i + 3];
        for (; i < 80; i++) {
            uint32_t x = w[i - 3] ^ w[i - 8] ^ w[i - 14] ^ w[i - 16];
            w[i] = x << 1 | x >> 31;
        }
        for (i = 0; i < 80; i++) {
            uint32_t f = i < 20   ? (b & c) | (~b & d)
                         : i < 40 ? b ^ c ^ d
                         : i < 60 ? (b & c) | (b & d) | (c & d)
                                  : b ^ c ^ d;
            uint32_t k = i < 20 ? 0x5a827999u : i < 40 ? 0x6ed9eba1u : i < 60 ? 0x8f1bbcdcu : 0xca62c1d6u;
            uint32_t next = (a << 5 | a >> 27) + f + e + k + w[i];
            e = d;
            d = c;
            c = b << 30 | b >> 2;
            b = a;
            a = next;
        }
        h[0] += a;
        h[1] += b;
        h[2] += c;
        h[3] += d;
        h[4] += e;
    }
    for (i = 0; i < 20; i++) digest[i] = (uint8_t)(h[i / 4] >> (24 - 8 * (i % 4)));
}

/* out: 4 characters for every 3 bytes begun, and 0. */
static inline void specmoe_base64_(const uint8_t *data, size_t bytes, char *out) {
    static const char letters[] = "ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz0123456789+/";
    size_t i;
    for (i = 0; i < bytes; i += 3) {
        uint32_t three = (uint32_t)data[i] << 16;
        if (i + 1 < bytes) three |= (uint32_t)data[i + 1] << 8;
        if (i + 2 < bytes) three |= data[i + 2];
        *out++ = letters[three >> 18];
        *out++ = letters[three >> 12 & 63];
        *out++ = i + 1 < bytes ? letters[three >> 6 & 63] : '=';
        *out++ = i + 2 < bytes ? letters[three & 63] : '=';
    }
    *out = 0;
}

/* ---- The stream's own state ------------------------------------------------------------------------------------- */

enum {
    SPECMOE_HEADER_ = 16,
    SPECMOE_WELCOME_BYTES_ = 40,
    SPECMOE_IN_BYTES_ = 1 << 16,
    SPECMOE_SPARE_BYTES_ = 1 << 18
};
enum { SPECMOE_LEAST_MESSAGE_BYTES_ = 1 << 14, SPECMOE_RANDOM_BYTES_ = 4096, SPECMOE_READS_ = 16 };
enum {
    SPECMOE_HELLO_ = 1,
    SPECMOE_OPEN_ = 2,
    SPECMOE_START_ = 4,
    SPECMOE_ROUTING_ = 5,
    SPECMOE_END_ = 6,
    SPECMOE_ASK_ = 7,
    SPECMOE_CLOSE_SEQUENCES_ = 8
};
enum {
    SPECMOE_WELCOME_ = 128,
    SPECMOE_FORECAST_ = 129,
    SPECMOE_REFUSED_ = 131,
    SPECMOE_GOODBYE_ = 132,
    SPECMOE_EXPIRED_ = 133
};
/* A sequence's `seen`, below the number of layers that were told of its token. */
enum { SPECMOE_CLOSED_ = -3, SPECMOE_FORGOTTEN_ = -2, SPECMOE_IDLE_ = -1 };
#define SPECMOE_MOST_BYTES_ ((uint64_t)1 << 30)

/* A sequence. wire: its number in messages, another one each time it is opened. tag: of the newest message about it.
 * due: layers told when a forecast was last due in this token, -1: none was. has: a forecast of this token is there. */
typedef struct specmoe_slot_ {
    uint32_t wire, opened, started, tag, mark;
    int seen, due, refused, has;
    int first_layer, layers, width;
} specmoe_slot_;

struct specmoe_stream {
    specmoe_status status;
    specmoe_options options;
    int descriptor, gone, unwritable, welcomed;
    uint32_t max_frame_bytes, tag, mark;
    int most_width, expert_bytes;
    specmoe_slot_ *slots;
    uint16_t *sizes, *experts; /* [max_sequences, L], [max_sequences, L, most_width] */
    float *probabilities;      /* [max_sequences, L, most_width] */
    specmoe_frames_ frames;
    uint8_t *in;  /* what the kernel hands over */
    uint8_t *out; /* what the kernel has not taken yet: from out_begin to out_end */
    size_t out_begin, out_end, out_capacity;
    uint8_t random[SPECMOE_RANDOM_BYTES_];
    size_t random_left;
    char refusal[256], error[SPECMOE_ERROR_BYTES_];
};

#if defined(__GNUC__)
__attribute__((format(printf, 3, 4)))
#endif
static inline int specmoe_fail_(specmoe_stream *stream, int code, const char *format, ...) {
    va_list arguments;
    if (stream->gone) return SPECMOE_GONE; /* what ended it is what a person wants to read */
    va_start(arguments, format);
    vsnprintf(stream->error, sizeof stream->error, format, arguments);
    va_end(arguments);
    if (code == SPECMOE_GONE) stream->gone = 1;
    return code;
}

/* Until the descriptor can be read, or written to, or the time is over; it may return early. */
static inline void specmoe_sleep_(int descriptor, int reading, int writing, int64_t microseconds) {
    if (microseconds <= 0) return;
    if (microseconds > 3600000000LL) microseconds = 3600000000LL; /* an hour, and the caller comes again */
    if (descriptor < (int)FD_SETSIZE) { /* select counts microseconds, poll milliseconds */
        fd_set readable, writable;
        struct timeval time;
        FD_ZERO(&readable);
        FD_ZERO(&writable);
        if (reading) FD_SET(descriptor, &readable);
        if (writing) FD_SET(descriptor, &writable);
        time.tv_sec = (time_t)(microseconds / 1000000);
        time.tv_usec = (suseconds_t)(microseconds % 1000000);
        select(descriptor + 1, &readable, &writable, NULL, &time);
    } else {
        struct pollfd one;
        one.fd = descriptor;
        one.events = (short)((reading ? POLLIN : 0) | (writing ? POLLOUT : 0));
        one.revents = 0;
        poll(&one, 1, (int)(microseconds / 1000));
    }
}

static inline int specmoe_can_be_read_(int descriptor) {
    struct pollfd one;
    one.fd = descriptor;
    one.events = POLLIN;
    one.revents = 0;
    return poll(&one, 1, 0) > 0;
}

static inline int specmoe_random_(specmoe_stream *stream, uint8_t *into, size_t bytes) {
    if (stream->random_left < bytes) {
        int source = open("/dev/urandom", O_RDONLY | O_CLOEXEC);
        size_t read_so_far = 0;
        while (source >= 0 && read_so_far < sizeof stream->random) {
            ssize_t got = read(source, stream->random + read_so_far, sizeof stream->random - read_so_far);
            if (got <= 0 && errno != EINTR) break;
            if (got > 0) read_so_far += (size_t)got;
        }
        if (source >= 0) close(source);
        if (read_so_far < sizeof stream->random)
            return specmoe_fail_(stream, SPECMOE_GONE,
                                 "/dev/urandom cannot be read; RFC 6455 wants random masks.");
        stream->random_left = sizeof stream->random;
    }
    memcpy(into, stream->random + sizeof stream->random - stream->random_left, bytes);
    stream->random_left -= bytes;
    return SPECMOE_OK;
}

/* ---- Sending ---------------------------------------------------------------------------------------------------- */

static inline ssize_t specmoe_send_(int descriptor, const uint8_t *data, size_t bytes) {
#ifdef MSG_NOSIGNAL
    return send(descriptor, data, bytes, MSG_NOSIGNAL);
#else
    return send(descriptor, data, bytes, 0); /* SO_NOSIGPIPE was set */
#endif
}

static inline int specmoe_receive_(specmoe_stream *stream);

/* It cannot be written to. Where the service said why it closed, that is what a person wants to read. */
static inline int specmoe_unwritable_(specmoe_stream *stream, int failure) {
    int result = SPECMOE_OK;
    stream->out_begin = stream->out_end = 0;
    if (stream->unwritable) return SPECMOE_OK;
    stream->unwritable = 1;
    while (!result && specmoe_can_be_read_(stream->descriptor)) result = specmoe_receive_(stream);
    return result ? result
                  : specmoe_fail_(stream, SPECMOE_GONE, "The stream cannot be written to: %s.",
                                  strerror(failure));
}

/* What the kernel takes now. */
static inline int specmoe_flush_(specmoe_stream *stream) {
    while (stream->out_begin < stream->out_end) {
        ssize_t sent = specmoe_send_(stream->descriptor, stream->out + stream->out_begin,
                                     stream->out_end - stream->out_begin);
        if (sent < 0 && errno == EINTR) continue;
        if (sent < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) return SPECMOE_OK;
        if (sent < 0) return specmoe_unwritable_(stream, errno);
        stream->out_begin += (size_t)sent;
    }
    stream->out_begin = stream->out_end = 0;
    return SPECMOE_OK;
}

/* Room for a frame of that payload, header and mask written; `payload` is where the caller writes it. */
static inline int specmoe_frame_(specmoe_stream *stream, int opcode, size_t bytes, uint8_t **payload) {
    size_t header = bytes < 126 ? 6 : bytes < 65536 ? 8 : 14, i;
    uint8_t *at;
    if (stream->out_begin && stream->out_end + header + bytes > stream->out_capacity) {
        memmove(stream->out, stream->out + stream->out_begin, stream->out_end - stream->out_begin);
        stream->out_end -= stream->out_begin;
        stream->out_begin = 0;
    }
    if (stream->out_end + header + bytes > stream->out_capacity)
        return specmoe_fail_(stream, SPECMOE_GONE,
                             "The service did not read %zu bytes. Check that it runs and is not overloaded.",
                             stream->out_end - stream->out_begin);
    at = stream->out + stream->out_end;
    at[0] = (uint8_t)(0x80 | opcode);
    if (bytes < 126) {
        at[1] = (uint8_t)(0x80 | bytes);
    } else if (bytes < 65536) {
        at[1] = 0x80 | 126;
        at[2] = (uint8_t)(bytes >> 8);
        at[3] = (uint8_t)bytes;
    } else {
        at[1] = 0x80 | 127;
        for (i = 0; i < 8; i++) at[2 + i] = (uint8_t)((uint64_t)bytes >> (56 - 8 * i));
    }
    *payload = at + header;
    return specmoe_random_(stream, at + header - 4, 4);
}

/* Mask what was written and send it. */
static inline int specmoe_send_frame_(specmoe_stream *stream, uint8_t *payload, size_t bytes) {
    const uint8_t *mask = payload - 4;
    size_t i;
    for (i = 0; i < bytes; i++) payload[i] ^= mask[i & 3];
    stream->out_end = (size_t)(payload - stream->out) + bytes;
    return specmoe_flush_(stream);
}

static inline int specmoe_control_(specmoe_stream *stream, int opcode, const uint8_t *data, size_t bytes) {
    uint8_t *payload = NULL;
    int result = specmoe_frame_(stream, opcode, bytes, &payload);
    if (result) return result;
    if (bytes) memcpy(payload, data, bytes);
    return specmoe_send_frame_(stream, payload, bytes);
}

/* Room for a message about sequences; their numbers are written, `body` is what follows. bytes: of all of it. */
static inline int specmoe_message_(specmoe_stream *stream, int kind, int flags, const uint32_t *sequences,
                                   size_t count, int first_layer, int layers, size_t body_bytes,
                                   uint8_t **payload, uint8_t **body) {
    size_t bytes = SPECMOE_HEADER_ + 4 * count + body_bytes, i;
    int result;
    if (bytes > stream->max_frame_bytes)
        return specmoe_fail_(
            stream, SPECMOE_INVALID,
            "A message has %zu bytes, the service takes %lu at most: tell fewer sequences or layers at once.",
            bytes, (unsigned long)stream->max_frame_bytes);
    result = specmoe_frame_(stream, SPECMOE_BINARY_, bytes, payload);
    if (result) return result;
    stream->tag++;
    memset(*payload, 0, SPECMOE_HEADER_);
    (*payload)[0] = (uint8_t)kind;
    (*payload)[1] = (uint8_t)flags;
    specmoe_put16_(*payload + 2, (uint32_t)count);
    specmoe_put32_(*payload + 4, stream->tag);
    specmoe_put16_(*payload + 8, (uint32_t)first_layer);
    specmoe_put16_(*payload + 10, (uint32_t)layers);
    for (i = 0; i < count; i++) {
        specmoe_slot_ *slot = &stream->slots[sequences[i]];
        slot->tag = stream->tag;
        specmoe_put32_(*payload + SPECMOE_HEADER_ + 4 * i, slot->wire);
    }
    *body = *payload + SPECMOE_HEADER_ + 4 * count;
    return SPECMOE_OK;
}

/* open, end, ask or close: nothing but sequences. */
static inline int specmoe_named_(specmoe_stream *stream, int kind, const uint32_t *sequences, size_t count) {
    uint8_t *payload = NULL, *body = NULL;
    int result = specmoe_message_(stream, kind, 0, sequences, count, 0, 0, 0, &payload, &body);
    return result ? result : specmoe_send_frame_(stream, payload, (size_t)(body - payload));
}

/* ---- Receiving -------------------------------------------------------------------------------------------------- */

static inline int specmoe_odd_(specmoe_stream *stream, const char *what, unsigned long came,
                               unsigned long expected) {
    char said[160];
    snprintf(said, sizeof said, what, came, expected);
    return specmoe_fail_(stream, SPECMOE_GONE,
                         "The stream said something else than the protocol allows: %s. Check that the "
                         "address leads to specMoE "
                         "itself and that its version fits this client's.",
                         said);
}

static inline int specmoe_take_forecast_(specmoe_stream *stream, const uint8_t *message, size_t bytes) {
    size_t count = specmoe_get16_(message + 2), first = specmoe_get16_(message + 8),
           layers = specmoe_get16_(message + 10);
    size_t rows = count * layers, before = SPECMOE_HEADER_ + 8 * count + 2 * rows,
           row_bytes = rows * (4 + (size_t)stream->expert_bytes);
    size_t width, i, j, k, num_layers = (size_t)stream->status.num_layers;
    const uint8_t *probabilities, *sizes, *experts;
    if (!count || count > stream->options.max_sequences)
        return specmoe_odd_(stream, "a forecast of %lu sequences, expected 1 to %lu", count,
                            stream->options.max_sequences);
    if (!layers || first + layers > num_layers)
        return specmoe_odd_(stream, "a forecast up to layer %lu of %lu", first + layers, num_layers);
    width = bytes > before ? (bytes - before) / row_bytes : 0;
    if (!width || width > (size_t)stream->most_width || before + width * row_bytes != bytes)
        return specmoe_odd_(stream, "a forecast in %lu bytes, expected rows of 1 to %lu experts", bytes,
                            (unsigned long)stream->most_width);
    probabilities = message + SPECMOE_HEADER_ + 8 * count;
    sizes = probabilities + 4 * rows * width;
    experts = sizes + 2 * rows;
    for (j = 0; j < rows; j++)
        if (specmoe_get16_(sizes + 2 * j) > width)
            return specmoe_odd_(stream, "a layer with %lu experts in rows of %lu",
                                specmoe_get16_(sizes + 2 * j), width);
    stream->status.dropped = specmoe_get32_(message + 12);
    for (i = 0; i < count; i++) {
        uint32_t wire = specmoe_get32_(message + SPECMOE_HEADER_ + 4 * i);
        uint32_t token = specmoe_get32_(message + SPECMOE_HEADER_ + 4 * count + 4 * i);
        size_t number = wire % stream->options.max_sequences, slots = layers * width;
        specmoe_slot_ *slot = &stream->slots[number];
        float *into = stream->probabilities + number * num_layers * (size_t)stream->most_width;
        uint16_t *ids = stream->experts + number * num_layers * (size_t)stream->most_width;
        if (slot->wire != wire || slot->seen < 0 || slot->started != token + 1)
            continue; /* it came too late */
        if ((int)first > slot->seen)
            return specmoe_odd_(stream, "a forecast after %lu layers of a token, of which %lu were told",
                                first, (unsigned long)slot->seen);
        slot->has = 0;
        for (k = 0; k < slots; k++) {
            float probability = specmoe_get_float_(probabilities + 4 * (i * slots + k));
            const uint8_t *id = experts + (i * slots + k) * (size_t)stream->expert_bytes;
            uint16_t expert = stream->expert_bytes == 1 ? *id : specmoe_get16_(id);
            if (!(probability >= 0.0f && probability <= 1.0f))
                return specmoe_odd_(stream, "a probability that is not within 0 and 1", 0, 0);
            if (expert >= stream->status.num_experts)
                return specmoe_odd_(stream, "expert %lu of a model with %lu", expert,
                                    (unsigned long)stream->status.num_experts);
            into[k] = probability;
            ids[k] = expert;
        }
        for (j = 0; j < layers; j++)
            stream->sizes[number * num_layers + j] = specmoe_get16_(sizes + 2 * (i * layers + j));
        slot->first_layer = (int)first;
        slot->layers = (int)layers;
        slot->width = (int)width;
        slot->has = 1;
    }
    return SPECMOE_OK;
}

/* An `error`: the service's words are its JSON, as it came. One that ends nothing concerns the message with its tag. */
static inline int specmoe_take_error_(specmoe_stream *stream, const uint8_t *message, size_t bytes) {
    char words[256];
    uint32_t tag = specmoe_get32_(message + 4), i;
    if (specmoe_get32_(message + 12) != bytes - SPECMOE_HEADER_)
        return specmoe_odd_(stream, "an error in %lu bytes, expected %lu", bytes - SPECMOE_HEADER_,
                            specmoe_get32_(message + 12));
    specmoe_printable_(words, sizeof words, message + SPECMOE_HEADER_, bytes - SPECMOE_HEADER_);
    if (message[1] & 1 || !stream->welcomed)
        return specmoe_fail_(stream, SPECMOE_GONE, "The service ended the stream: %s", words);
    memcpy(stream->refusal, words, sizeof words);
    /* Whatever was told of a sequence after a message that was refused is refused, too: the newest says so in the end. */
    for (i = 0; i < stream->options.max_sequences; i++)
        if (stream->slots[i].tag == tag && stream->slots[i].seen >= SPECMOE_IDLE_) {
            stream->slots[i].seen = SPECMOE_FORGOTTEN_;
            stream->slots[i].refused = 1;
        }
    return SPECMOE_OK;
}

static inline int specmoe_take_expired_(specmoe_stream *stream, const uint8_t *message, size_t bytes) {
    size_t count = specmoe_get16_(message + 2), i;
    if (bytes != SPECMOE_HEADER_ + 4 * count)
        return specmoe_odd_(stream, "expired in %lu bytes, expected %lu", bytes, SPECMOE_HEADER_ + 4 * count);
    for (i = 0; i < count; i++) {
        uint32_t wire = specmoe_get32_(message + SPECMOE_HEADER_ + 4 * i);
        specmoe_slot_ *slot = &stream->slots[wire % stream->options.max_sequences];
        if (slot->wire == wire && slot->seen >= SPECMOE_IDLE_) {
            slot->seen = SPECMOE_FORGOTTEN_;
            slot->refused = 0;
        }
    }
    return SPECMOE_OK;
}

static inline int specmoe_take_welcome_(specmoe_stream *stream, const uint8_t *message, size_t bytes);

static inline int specmoe_take_message_(specmoe_stream *stream, const uint8_t *message, size_t bytes) {
    if (bytes < SPECMOE_HEADER_)
        return specmoe_odd_(stream, "a message has %lu bytes, expected a header of %lu at least", bytes,
                            SPECMOE_HEADER_);
    if (message[0] == SPECMOE_REFUSED_) return specmoe_take_error_(stream, message, bytes);
    if (!stream->welcomed) return specmoe_take_welcome_(stream, message, bytes);
    switch (message[0]) {
        case SPECMOE_FORECAST_:
            return specmoe_take_forecast_(stream, message, bytes);
        case SPECMOE_EXPIRED_:
            return specmoe_take_expired_(stream, message, bytes);
        case SPECMOE_GOODBYE_:
            if (bytes != SPECMOE_HEADER_)
                return specmoe_odd_(stream, "goodbye has %lu bytes, expected %lu", bytes, SPECMOE_HEADER_);
            stream->status.milliseconds_left = specmoe_get32_(message + 12);
            return SPECMOE_OK;
        default:
            return specmoe_odd_(stream, "a message of kind %lu, expected %lu, 131, 132 or 133", message[0],
                                SPECMOE_FORECAST_);
    }
}

static inline int specmoe_take_close_(specmoe_stream *stream) {
    const specmoe_frames_ *frames = &stream->frames;
    char reason[SPECMOE_CONTROL_BYTES_];
    if (frames->control_bytes < 2)
        return specmoe_fail_(stream, SPECMOE_GONE, "The service closed the stream without a reason.");
    specmoe_printable_(reason, sizeof reason, frames->control + 2, frames->control_bytes - 2);
    return specmoe_fail_(stream, SPECMOE_GONE,
                         "The service closed the stream: %s (close code %d, see docs/stream-protocol.md)",
                         reason, frames->control[0] << 8 | frames->control[1]);
}

/* Bytes as they came. */
static inline int specmoe_feed_(specmoe_stream *stream, const uint8_t *data, size_t bytes) {
    specmoe_frames_ *frames = &stream->frames;
    int result = SPECMOE_OK;
    while (bytes && !result) {
        int event;
        size_t taken = specmoe_frames_take_(frames, data, bytes, &event);
        data += taken;
        bytes -= taken;
        switch (event) {
            case SPECMOE_BROKEN_:
                result = specmoe_odd_(stream, frames->error, 0, 0);
                break;
            case SPECMOE_BINARY_:
                result = specmoe_take_message_(stream, frames->message, frames->bytes);
                break;
            case SPECMOE_TEXT_: /* before hello the service knows no better, and closes with the same words */
                if (stream->welcomed)
                    result = specmoe_odd_(stream, "a text message of %lu bytes, expected binary ones",
                                          frames->bytes, 0);
                break;
            case SPECMOE_PING_:
                result = specmoe_control_(stream, SPECMOE_PONG_, frames->control, frames->control_bytes);
                break;
            case SPECMOE_CLOSE_:
                specmoe_control_(stream, SPECMOE_CLOSE_, frames->control, frames->control_bytes < 2 ? 0 : 2);
                result = specmoe_take_close_(stream);
                break;
            default:
                break;
        }
    }
    return result;
}

/* Take in what has come; what is left after SPECMOE_READS_ reads is for the next call. */
static inline int specmoe_receive_(specmoe_stream *stream) {
    int reads;
    for (reads = 0; reads < SPECMOE_READS_; reads++) {
        ssize_t got = recv(stream->descriptor, stream->in, SPECMOE_IN_BYTES_, 0);
        int result;
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && (errno == EAGAIN || errno == EWOULDBLOCK)) break;
        if (got < 0)
            return specmoe_fail_(stream, SPECMOE_GONE, "The stream cannot be read: %s.", strerror(errno));
        if (got == 0)
            return specmoe_fail_(
                stream, SPECMOE_GONE, "The service hung up%s. Check that it runs.",
                stream->frames.in_payload || stream->frames.header_bytes ? " in the middle of a frame" : "");
        result = specmoe_feed_(stream, stream->in, (size_t)got);
        if (result) return result;
        if (got < SPECMOE_IN_BYTES_) break;
    }
    return specmoe_flush_(stream);
}

/* ---- Opening ---------------------------------------------------------------------------------------------------- */

static inline int specmoe_connect_to_(specmoe_stream *stream, const struct sockaddr *address, socklen_t bytes,
                                      int64_t end_us) {
    int on = 1, failure = 0, flags;
    socklen_t length = sizeof failure;
    stream->descriptor = socket(address->sa_family, SOCK_STREAM, 0);
    if (stream->descriptor < 0) return errno;
    flags = fcntl(stream->descriptor, F_GETFL, 0);
    fcntl(stream->descriptor, F_SETFL, flags | O_NONBLOCK);
    fcntl(stream->descriptor, F_SETFD, FD_CLOEXEC);
#ifdef SO_NOSIGPIPE
    setsockopt(stream->descriptor, SOL_SOCKET, SO_NOSIGPIPE, &on, sizeof on);
#endif
    if (address->sa_family != AF_UNIX)
        setsockopt(stream->descriptor, IPPROTO_TCP, TCP_NODELAY, &on, sizeof on);
    if (connect(stream->descriptor, address, bytes) == 0) return 0;
    if (errno != EINPROGRESS) return errno;
    for (;;) {
        struct pollfd one;
        int64_t left_us = end_us - specmoe_now_us_();
        one.fd = stream->descriptor;
        one.events = POLLOUT;
        one.revents = 0;
        if (left_us <= 0) return ETIMEDOUT;
        if (poll(&one, 1, (int)(left_us / 1000) + 1) > 0) break;
    }
    if (getsockopt(stream->descriptor, SOL_SOCKET, SO_ERROR, &failure, &length)) return errno;
    return failure;
}

static inline int specmoe_connect_unix_(specmoe_stream *stream, const char *path, int64_t end_us) {
    struct sockaddr_un address;
    int failure;
    memset(&address, 0, sizeof address);
    address.sun_family = AF_UNIX;
    if (!*path || strlen(path) >= sizeof address.sun_path)
        return specmoe_fail_(stream, SPECMOE_GONE,
                             "The path of the Unix socket has %zu bytes, expected 1 to %zu.", strlen(path),
                             sizeof address.sun_path - 1);
    memcpy(address.sun_path, path, strlen(path));
    failure = specmoe_connect_to_(stream, (struct sockaddr *)&address, sizeof address, end_us);
    if (failure)
        return specmoe_fail_(stream, SPECMOE_GONE,
                             "Cannot connect to unix:%s: %s. Check that the service runs.", path,
                             strerror(failure));
    return SPECMOE_OK;
}

/* host, port: as written in the address. */
static inline int specmoe_connect_tcp_(specmoe_stream *stream, const char *host, const char *port,
                                       int64_t end_us) {
    struct addrinfo hints, *found = NULL, *each;
    int failure;
    memset(&hints, 0, sizeof hints);
    hints.ai_socktype = SOCK_STREAM;
    hints.ai_flags = AI_NUMERICSERV;
    failure = getaddrinfo(host, port, &hints, &found);
    if (failure)
        return specmoe_fail_(stream, SPECMOE_GONE, "There is no host %s, port %s: %s.", host, port,
                             gai_strerror(failure));
    failure = EHOSTUNREACH;
    for (each = found; each && failure; each = each->ai_next) {
        if (stream->descriptor >= 0) close(stream->descriptor);
        failure = specmoe_connect_to_(stream, each->ai_addr, each->ai_addrlen, end_us);
    }
    freeaddrinfo(found);
    if (failure)
        return specmoe_fail_(stream, SPECMOE_GONE,
                             "Cannot connect to %s, port %s: %s. Check that the service runs.", host, port,
                             strerror(failure));
    return SPECMOE_OK;
}

static inline int specmoe_connect_(specmoe_stream *stream, const char *address, int64_t end_us) {
    char host[256], port[8];
    const char *colon;
    size_t bytes, port_bytes;
    if (!strncmp(address, "unix:", 5)) return specmoe_connect_unix_(stream, address + 5, end_us);
    if (!strncmp(address, "http://", 7)) address += 7;
    colon = strrchr(address, ':');
    bytes = colon ? (size_t)(colon - address) : 0;
    port_bytes = colon ? strspn(colon + 1, "0123456789") : 0;
    if (bytes > 2 && address[0] == '[' && address[bytes - 1] == ']') {
        address++;
        bytes -= 2;
    }
    if (!bytes || bytes >= sizeof host || !port_bytes || port_bytes >= sizeof port ||
        strcmp(colon + 1 + port_bytes, colon[1 + port_bytes] == '/' ? "/" : ""))
        return specmoe_fail_(stream, SPECMOE_GONE,
                             "The address is %.200s, expected unix:PATH or http://HOST:PORT.", address);
    memcpy(host, address, bytes);
    host[bytes] = 0;
    memcpy(port, colon + 1, port_bytes);
    port[port_bytes] = 0;
    return specmoe_connect_tcp_(stream, host, port, end_us);
}

static inline int specmoe_late_(specmoe_stream *stream, const char *what) {
    return specmoe_fail_(stream, SPECMOE_GONE,
                         "%s within %lu ms. See the service's load, or allow more time.", what,
                         (unsigned long)stream->options.open_timeout_ms);
}

/* The value of a header, without blanks around it; NULL where it is not there. head: ends with an empty line. */
static inline const char *specmoe_header_(const char *head, const char *name, size_t *bytes) {
    size_t name_bytes = strlen(name);
    const char *line = strstr(head, "\r\n");
    while (line && line[2] != '\r') {
        const char *end = strstr(line + 2, "\r\n");
        line += 2;
        if (!end) return NULL;
        if (!strncasecmp(line, name, name_bytes) && line[name_bytes] == ':') {
            line += name_bytes + 1;
            while (*line == ' ' || *line == '\t') line++;
            while (end > line && (end[-1] == ' ' || end[-1] == '\t')) end--;
            *bytes = (size_t)(end - line);
            return line;
        }
        line = end;
    }
    return NULL;
}

/* An answer that is no upgrade: its first line, and what is there of its body. */
static inline int specmoe_refused_(specmoe_stream *stream, const char *head, size_t head_bytes,
                                   size_t bytes) {
    char line[100], body[300];
    specmoe_printable_(line, sizeof line, head, strcspn(head, "\r\n"));
    specmoe_printable_(body, sizeof body, head + head_bytes, bytes - head_bytes);
    return specmoe_fail_(stream, SPECMOE_GONE, "The handshake was refused, expected HTTP/1.1 101: %s %s",
                         line, body);
}

/* The head of the answer is whole: is it an upgrade? */
static inline int specmoe_upgraded_(specmoe_stream *stream, const char *head, const char *key) {
    char expected[64], came[64], text[96];
    uint8_t digest[20];
    size_t bytes = 0;
    const char *accept = specmoe_header_(head, "Sec-WebSocket-Accept", &bytes);
    snprintf(text, sizeof text, "%s258EAFA5-E914-47DA-95CA-C5AB0DC85B11", key);
    specmoe_sha1_(text, strlen(text), digest);
    specmoe_base64_(digest, sizeof digest, expected);
    specmoe_printable_(came, sizeof came, accept ? accept : "none", accept ? bytes : 4);
    if (strcmp(came, expected))
        return specmoe_fail_(stream, SPECMOE_GONE, "The handshake's Sec-WebSocket-Accept is %s, expected %s.",
                             came, expected);
    accept = specmoe_header_(head, "Upgrade", &bytes);
    if (!accept || bytes != 9 || strncasecmp(accept, "websocket", 9))
        return specmoe_fail_(stream, SPECMOE_GONE, "The handshake's answer does not upgrade to websocket.");
    if (specmoe_header_(head, "Sec-WebSocket-Extensions", &bytes) ||
        specmoe_header_(head, "Sec-WebSocket-Protocol", &bytes))
        return specmoe_fail_(stream, SPECMOE_GONE,
                             "The handshake's answer has an extension or a subprotocol, expected none.");
    return SPECMOE_OK;
}

/* Read the answer to the handshake into `in`; what follows it is of the stream already. */
static inline int specmoe_read_answer_(specmoe_stream *stream, const char *key, int64_t end_us) {
    char *head = (char *)stream->in;
    size_t bytes = 0, head_bytes = 0, body_bytes = 0, most = SPECMOE_LEAST_MESSAGE_BYTES_;
    int result;
    for (;;) {
        ssize_t got = recv(stream->descriptor, head + bytes, most - bytes, 0);
        if (got < 0 && errno == EINTR) continue;
        if (got < 0 && errno != EAGAIN && errno != EWOULDBLOCK)
            return specmoe_fail_(stream, SPECMOE_GONE, "The handshake's answer cannot be read: %s.",
                                 strerror(errno));
        if (got < 0) {
            int64_t left_us = end_us - specmoe_now_us_();
            if (left_us <= 0) return specmoe_late_(stream, "No whole answer to the handshake");
            specmoe_sleep_(stream->descriptor, 1, 0, left_us < 100000 ? left_us : 100000);
            continue;
        }
        bytes += (size_t)got;
        head[bytes] = 0;
        if (!head_bytes) {
            const char *end = strstr(head, "\r\n\r\n");
            size_t length = 0;
            const char *value;
            if (!end && (!got || bytes == most)) break;
            if (!end) continue;
            head_bytes = (size_t)(end - head) + 4;
            if (!strncmp(head, "HTTP/1.1 101", 12) && (head[12] == ' ' || head[12] == '\r')) {
                result = specmoe_upgraded_(stream, head, key);
                return result ? result : specmoe_feed_(stream, stream->in + head_bytes, bytes - head_bytes);
            }
            value = specmoe_header_(head, "Content-Length", &length);
            body_bytes = value ? (size_t)strtoul(value, NULL, 10) : 0;
        }
        if (!got || bytes == most || bytes - head_bytes >= body_bytes)
            return specmoe_refused_(stream, head, head_bytes, bytes);
    }
    if (!bytes)
        return specmoe_fail_(stream, SPECMOE_GONE, "The service hung up instead of answering the handshake.");
    specmoe_printable_(stream->refusal, 100, head, bytes);
    return specmoe_fail_(stream, SPECMOE_GONE,
                         "What answers speaks no HTTP: %zu bytes came, beginning with \"%s\".", bytes,
                         stream->refusal);
}

static inline int specmoe_shake_hands_(specmoe_stream *stream, int64_t end_us) {
    uint8_t nonce[16];
    char key[32];
    int result = specmoe_random_(stream, nonce, sizeof nonce);
    if (result) return result;
    specmoe_base64_(nonce, sizeof nonce, key);
    /* The service looks at no name, and this one needs no checking. */
    stream->out_end = (size_t)snprintf(
        (char *)stream->out, stream->out_capacity,
        "GET /v1/stream HTTP/1.1\r\nHost: localhost\r\nUpgrade: websocket\r\nConnection: Upgrade\r\n"
        "Sec-WebSocket-Key: %s\r\nSec-WebSocket-Version: 13\r\nUser-Agent: specmoe-c\r\n\r\n",
        key);
    result = specmoe_flush_(stream);
    if (result) return result;
    return specmoe_read_answer_(stream, key, end_us);
}

static inline int specmoe_hello_(specmoe_stream *stream) {
    const specmoe_options *options = &stream->options;
    const char *version = options->version ? options->version : "";
    size_t model_bytes = strlen(options->model), version_bytes = strlen(version),
           bytes = 32 + model_bytes + version_bytes;
    uint8_t *payload = NULL;
    int result;
    if (model_bytes > 1024 || version_bytes > 1024)
        return specmoe_fail_(stream, SPECMOE_GONE,
                             "The model's name has %zu bytes and the version %zu, expected 1024 at most.",
                             model_bytes, version_bytes);
    result = specmoe_frame_(stream, SPECMOE_BINARY_, bytes, &payload);
    if (result) return result;
    memset(payload, 0, bytes);
    payload[0] = SPECMOE_HELLO_;
    payload[1] = (uint8_t)(1 | (options->at_start ? 4 : 0) | (options->adapt ? 8 : 0));
    specmoe_put16_(payload + 8, options->every);
    specmoe_put16_(payload + 10, options->ahead);
    specmoe_put32_(payload + 12, 1);
    specmoe_put32_(payload + 16, options->deadline_us);
    specmoe_put_float_(payload + 20, options->coverage);
    specmoe_put16_(payload + 24, options->top_n);
    specmoe_put16_(payload + 26, (uint32_t)model_bytes);
    specmoe_put16_(payload + 28, (uint32_t)version_bytes);
    memcpy(payload + 32, options->model, model_bytes);
    memcpy(payload + 32 + model_bytes, version, version_bytes);
    return specmoe_send_frame_(stream, payload, bytes);
}

/* All that is needed from now on: a forecast of each sequence, the largest message either way. */
static inline int specmoe_allocate_(specmoe_stream *stream) {
    const specmoe_status *status = &stream->status;
    uint64_t sequences = stream->options.max_sequences, layers = (uint64_t)status->num_layers;
    uint64_t rows = sequences * layers, slots = rows * (uint64_t)stream->most_width;
    uint64_t in = SPECMOE_HEADER_ + 8 * sequences + 2 * rows + slots * (4 + (uint64_t)stream->expert_bytes);
    uint64_t out = SPECMOE_HEADER_ + 8 * sequences +
                   rows * (uint64_t)status->top_k * (4 + (uint64_t)stream->expert_bytes);
    uint32_t i;
    uint8_t *grown;
    if (out > stream->max_frame_bytes) out = stream->max_frame_bytes;
    if (in < SPECMOE_LEAST_MESSAGE_BYTES_) in = SPECMOE_LEAST_MESSAGE_BYTES_;
    if (in > SPECMOE_MOST_BYTES_ || out > SPECMOE_MOST_BYTES_)
        return specmoe_fail_(
            stream, SPECMOE_GONE,
            "%lu sequences need more than 1 GiB: ask for fewer, or for fewer experts a layer.",
            (unsigned long)sequences);
    stream->slots = (specmoe_slot_ *)calloc(sequences, sizeof *stream->slots);
    stream->sizes = (uint16_t *)calloc(rows, sizeof *stream->sizes);
    stream->experts = (uint16_t *)calloc(slots, sizeof *stream->experts);
    stream->probabilities = (float *)calloc(slots, sizeof *stream->probabilities);
    grown = (uint8_t *)malloc(in);
    if (grown) { /* the message that is being read stays where it is until it is over */
        memcpy(grown, stream->frames.message, stream->frames.bytes);
        free(stream->frames.message);
        stream->frames.message = grown;
        stream->frames.capacity = in;
    }
    stream->out_capacity = out + SPECMOE_SPARE_BYTES_;
    {
        uint8_t *larger = (uint8_t *)realloc(stream->out, stream->out_capacity);
        if (larger) stream->out = larger;
        if (!stream->slots || !stream->sizes || !stream->experts || !stream->probabilities || !grown ||
            !larger)
            return specmoe_fail_(stream, SPECMOE_GONE, "There is not enough memory for %lu sequences.",
                                 (unsigned long)sequences);
    }
    for (i = 0; i < stream->options.max_sequences; i++) stream->slots[i].seen = SPECMOE_CLOSED_;
    return SPECMOE_OK;
}

static inline int specmoe_take_welcome_(specmoe_stream *stream, const uint8_t *message, size_t bytes) {
    specmoe_status *status = &stream->status;
    if (message[0] != SPECMOE_WELCOME_ || bytes != SPECMOE_WELCOME_BYTES_)
        return specmoe_odd_(stream, "kind %lu of %lu bytes instead of a welcome of 40", message[0], bytes);
    if (specmoe_get16_(message + 22) != 1)
        return specmoe_odd_(stream, "a welcome of protocol %lu, expected %lu", specmoe_get16_(message + 22),
                            1);
    status->version = specmoe_get32_(message + 12);
    status->uses_token_ids = message[1] & 1;
    status->uses_gates = message[1] >> 1 & 1;
    status->num_layers = specmoe_get16_(message + 16);
    status->num_experts = specmoe_get16_(message + 18);
    status->top_k = specmoe_get16_(message + 20);
    status->idle_seconds = specmoe_get32_(message + 36);
    stream->max_frame_bytes = specmoe_get32_(message + 28);
    if (!status->num_layers || !status->top_k || status->top_k > status->num_experts)
        return specmoe_odd_(stream, "a welcome with top %lu of %lu experts, or without layers",
                            (unsigned long)status->top_k, (unsigned long)status->num_experts);
    stream->expert_bytes = status->num_experts <= 256 ? 1 : 2;
    stream->most_width = stream->options.coverage > 0 ? status->num_experts
                         : stream->options.top_n      ? stream->options.top_n
                                                      : 2 * status->top_k;
    if (stream->most_width > status->num_experts) stream->most_width = status->num_experts;
    stream->welcomed = 1;
    return specmoe_allocate_(stream);
}

static inline int specmoe_be_welcomed_(specmoe_stream *stream, int64_t end_us) {
    int result = specmoe_shake_hands_(stream, end_us);
    if (!result) result = specmoe_hello_(stream);
    while (!result && !stream->welcomed) {
        int64_t left_us = end_us - specmoe_now_us_();
        if (left_us <= 0) return specmoe_late_(stream, "No welcome");
        specmoe_sleep_(stream->descriptor, 1, 0, left_us);
        result = specmoe_receive_(stream);
    }
    return result;
}

static inline specmoe_options specmoe_defaults(const char *address, const char *model) {
    specmoe_options options;
    memset(&options, 0, sizeof options);
    options.address = address;
    options.model = model;
    options.every = 1;
    options.at_start = 1;
    options.max_sequences = 64;
    options.open_timeout_ms = 10000;
    return options;
}

static inline specmoe_stream *specmoe_open(const specmoe_options *options, char *error, size_t error_bytes) {
    specmoe_stream *stream = (specmoe_stream *)calloc(1, sizeof *stream);
    int64_t end_us = specmoe_now_us_() + (int64_t)options->open_timeout_ms * 1000;
    int result;
    if (!stream) {
        snprintf(error, error_bytes, "There is not enough memory for a stream.");
        return NULL;
    }
    stream->options = *options;
    stream->descriptor = -1;
    stream->status.milliseconds_left = -1;
    stream->frames.capacity = SPECMOE_LEAST_MESSAGE_BYTES_;
    stream->frames.message = (uint8_t *)malloc(SPECMOE_LEAST_MESSAGE_BYTES_);
    stream->in = (uint8_t *)malloc(SPECMOE_IN_BYTES_ + 1);
    stream->out_capacity = SPECMOE_LEAST_MESSAGE_BYTES_;
    stream->out = (uint8_t *)malloc(stream->out_capacity);
    if (!stream->frames.message || !stream->in || !stream->out)
        result = specmoe_fail_(stream, SPECMOE_GONE, "There is not enough memory for a stream.");
    else if (!options->address || !options->model)
        result = specmoe_fail_(stream, SPECMOE_GONE, "An address and a model are needed.");
    else if (options->max_sequences < 1 || options->max_sequences > 65535)
        result = specmoe_fail_(stream, SPECMOE_GONE, "max_sequences is %lu, expected 1 to 65535.",
                               (unsigned long)options->max_sequences);
    else if (!(options->coverage >= 0 && options->coverage < 1) || (options->coverage > 0 && options->top_n))
        result =
            specmoe_fail_(stream, SPECMOE_GONE,
                          "coverage is %g and top_n %d; expected a coverage below 1, or top_n, not both.",
                          (double)options->coverage, options->top_n);
    else if (options->adapt && !(options->coverage > 0))
        result = specmoe_fail_(stream, SPECMOE_GONE, "adapt needs a coverage, and there is none.");
    else
        result = specmoe_connect_(stream, options->address, end_us);
    if (!result) result = specmoe_be_welcomed_(stream, end_us);
    if (!result) return stream;
    specmoe_printable_(error, error_bytes, stream->error, strlen(stream->error));
    specmoe_close(stream);
    return NULL;
}

static inline void specmoe_close(specmoe_stream *stream) {
    static const uint8_t normal[2] = {1000 >> 8, 1000 & 0xff};
    if (!stream) return;
    if (stream->descriptor >= 0) {
        if (!stream->gone && !specmoe_control_(stream, SPECMOE_CLOSE_, normal, sizeof normal))
            shutdown(stream->descriptor, SHUT_WR);
        close(stream->descriptor);
    }
    free(stream->slots);
    free(stream->sizes);
    free(stream->experts);
    free(stream->probabilities);
    free(stream->frames.message);
    free(stream->in);
    free(stream->out);
    free(stream);
}

static inline const char *specmoe_error(const specmoe_stream *stream) { return stream->error; }

static inline const specmoe_status *specmoe_status_of(const specmoe_stream *stream) {
    return &stream->status;
}

/* ---- Telling ---------------------------------------------------------------------------------------------------- */

static inline int specmoe_lost_(specmoe_stream *stream, uint32_t sequence) {
    const specmoe_slot_ *slot = &stream->slots[sequence];
    return specmoe_fail_(stream, SPECMOE_LOST, "Sequence %lu is lost: %s%s. Close it, and open it again.",
                         (unsigned long)sequence,
                         slot->refused ? "the service refused what was told of it: "
                                       : "the service forgot it, since nothing was told of it for long",
                         slot->refused ? stream->refusal : "");
}

enum { SPECMOE_WANT_OPEN_, SPECMOE_WANT_CLOSED_, SPECMOE_WANT_BETWEEN_, SPECMOE_WANT_WITHIN_ };

/* Whether all may be named together, and are as they are wanted. */
static inline int specmoe_check_(specmoe_stream *stream, const uint32_t *sequences, size_t count, int want) {
    size_t i;
    if (stream->gone) return SPECMOE_GONE;
    if (!count || count > stream->options.max_sequences)
        return specmoe_fail_(stream, SPECMOE_INVALID, "%zu sequences came, expected 1 to %lu.", count,
                             (unsigned long)stream->options.max_sequences);
    stream->mark++;
    for (i = 0; i < count; i++) {
        unsigned long number = sequences[i];
        specmoe_slot_ *slot;
        if (number >= stream->options.max_sequences)
            return specmoe_fail_(stream, SPECMOE_INVALID,
                                 "Sequence %lu came, expected numbers below max_sequences, %lu.", number,
                                 (unsigned long)stream->options.max_sequences);
        slot = &stream->slots[number];
        if (slot->mark == stream->mark)
            return specmoe_fail_(stream, SPECMOE_INVALID, "Sequence %lu stands twice in one call.", number);
        slot->mark = stream->mark;
        if ((slot->seen == SPECMOE_CLOSED_) != (want == SPECMOE_WANT_CLOSED_))
            return specmoe_fail_(
                stream, SPECMOE_INVALID, "Sequence %lu is %s.", number,
                want == SPECMOE_WANT_CLOSED_ ? "open already: close it first" : "not open: open it first");
        if (slot->seen == SPECMOE_FORGOTTEN_ && want != SPECMOE_WANT_OPEN_)
            return specmoe_lost_(stream, sequences[i]);
        if (want == SPECMOE_WANT_BETWEEN_ && slot->seen >= 0)
            return specmoe_fail_(
                stream, SPECMOE_INVALID,
                "Sequence %lu is within a token, %d of its %d layers were told: tell the others, or end it.",
                number, slot->seen, stream->status.num_layers);
        if (want == SPECMOE_WANT_WITHIN_ && slot->seen < 0)
            return specmoe_fail_(stream, SPECMOE_INVALID,
                                 "Sequence %lu is between two tokens: start one first.", number);
        if (want == SPECMOE_WANT_WITHIN_ && slot->seen != stream->slots[sequences[0]].seen)
            return specmoe_fail_(stream, SPECMOE_INVALID,
                                 "Sequence %lu is at layer %d, sequence %lu at %d: tell them apart.", number,
                                 slot->seen, (unsigned long)sequences[0], stream->slots[sequences[0]].seen);
    }
    return SPECMOE_OK;
}

static inline int specmoe_open_sequences(specmoe_stream *stream, const uint32_t *sequences, size_t count) {
    uint32_t most = stream->options.max_sequences;
    size_t i;
    int result = specmoe_check_(stream, sequences, count, SPECMOE_WANT_CLOSED_);
    if (result) return result;
    for (i = 0; i < count; i++) {
        specmoe_slot_ *slot = &stream->slots[sequences[i]];
        slot->wire = slot->opened * most + sequences[i];
        slot->opened = slot->opened + 1 < UINT32_MAX / most ? slot->opened + 1 : 0;
        slot->started = 0;
        slot->has = 0;
        slot->seen = SPECMOE_IDLE_;
    }
    return specmoe_named_(stream, SPECMOE_OPEN_, sequences, count);
}

static inline int specmoe_close_sequences(specmoe_stream *stream, const uint32_t *sequences, size_t count) {
    size_t i;
    int result = specmoe_check_(stream, sequences, count, SPECMOE_WANT_OPEN_);
    for (i = 0; i < count && !result; i++) {
        specmoe_slot_ *slot = &stream->slots[sequences[i]];
        /* One by one: a message with a sequence that the service does not know would be refused whole. */
        if (slot->seen != SPECMOE_FORGOTTEN_ || slot->refused)
            result = specmoe_named_(stream, SPECMOE_CLOSE_SEQUENCES_, &sequences[i], 1);
        slot->seen = SPECMOE_CLOSED_;
        slot->refused = 0;
    }
    return result;
}

static inline int specmoe_start(specmoe_stream *stream, const uint32_t *sequences, size_t count,
                                const int32_t *token_ids) {
    int told = token_ids && stream->status.uses_token_ids, result;
    uint8_t *payload = NULL, *body = NULL;
    size_t i;
    result = specmoe_check_(stream, sequences, count, SPECMOE_WANT_BETWEEN_);
    if (result) return result;
    for (i = 0; told && i < count; i++)
        if (token_ids[i] < -1)
            return specmoe_fail_(stream, SPECMOE_INVALID,
                                 "Token id %ld came, expected 0 or more, or -1 where it is unknown.",
                                 (long)token_ids[i]);
    result = specmoe_message_(stream, SPECMOE_START_, told ? 1 : 0, sequences, count, 0, 0,
                              told ? 4 * count : 0, &payload, &body);
    if (result) return result;
    for (i = 0; i < count; i++) {
        specmoe_slot_ *slot = &stream->slots[sequences[i]];
        slot->seen = 0;
        slot->started++;
        slot->has = 0;
        slot->due = stream->options.at_start ? 0 : -1;
        if (told) specmoe_put32_(body + 4 * i, (uint32_t)token_ids[i]);
    }
    return specmoe_send_frame_(stream, payload, (size_t)(body - payload) + (told ? 4 * count : 0));
}

/* One layer of one sequence: K different experts of the model, gates that are weights. */
static inline int specmoe_check_layer_(specmoe_stream *stream, const int32_t *experts, const float *gates) {
    int top_k = stream->status.top_k, i, j;
    float sum = 0;
    for (i = 0; i < top_k; i++) {
        if (experts[i] < 0 || experts[i] >= stream->status.num_experts)
            return specmoe_fail_(stream, SPECMOE_INVALID, "Expert %ld came, expected 0 to %d.",
                                 (long)experts[i], stream->status.num_experts - 1);
        for (j = 0; j < i; j++)
            if (experts[j] == experts[i])
                return specmoe_fail_(stream, SPECMOE_INVALID, "Expert %ld stands twice in one layer.",
                                     (long)experts[i]);
        if (!gates) continue;
        if (!(gates[i] >= 0.0f && gates[i] <= 1e30f))
            return specmoe_fail_(stream, SPECMOE_INVALID, "Gate %g came, expected 0 to 1e30.",
                                 (double)gates[i]);
        sum += gates[i];
    }
    if (gates && !(sum > 0.0f))
        return specmoe_fail_(stream, SPECMOE_INVALID, "The gates of a layer are all 0.");
    return SPECMOE_OK;
}

static inline int specmoe_route(specmoe_stream *stream, const uint32_t *sequences, size_t count, int layers,
                                const int32_t *experts, const float *gates) {
    const specmoe_status *status = &stream->status;
    size_t i, slots, bytes, rows;
    uint8_t *payload = NULL, *body = NULL;
    int first, end, every = stream->options.every,
                    result = specmoe_check_(stream, sequences, count, SPECMOE_WANT_WITHIN_);
    if (result) return result;
    first = stream->slots[sequences[0]].seen;
    if (layers < 1 || layers > status->num_layers - first)
        return specmoe_fail_(stream, SPECMOE_INVALID,
                             "%d layers came, expected 1 to the %d that are left of the token.", layers,
                             status->num_layers - first);
    end = first + layers;
    rows = count * (size_t)layers;
    slots = rows * (size_t)status->top_k;
    for (i = 0; i < rows && !result; i++)
        result = specmoe_check_layer_(stream, experts + i * (size_t)status->top_k,
                                      gates ? gates + i * (size_t)status->top_k : NULL);
    if (result) return result;
    if (!status->uses_gates) gates = NULL;
    bytes = slots * ((gates ? 4 : 0) + (size_t)stream->expert_bytes);
    result = specmoe_message_(stream, SPECMOE_ROUTING_, gates ? 2 : 0, sequences, count, first, layers, bytes,
                              &payload, &body);
    if (result) return result;
    bytes += (size_t)(body - payload);
    for (i = 0; gates && i < slots; i++, body += 4) specmoe_put_float_(body, gates[i]);
    for (i = 0; i < slots; i++, body += stream->expert_bytes) {
        if (stream->expert_bytes == 1)
            *body = (uint8_t)experts[i];
        else
            specmoe_put16_(body, (uint32_t)experts[i]);
    }
    for (i = 0; i < count; i++) {
        specmoe_slot_ *slot = &stream->slots[sequences[i]];
        slot->seen = end < status->num_layers ? end : SPECMOE_IDLE_;
        if (every && end / every > first / every) slot->due = end;
    }
    return specmoe_send_frame_(stream, payload, bytes);
}

static inline int specmoe_end(specmoe_stream *stream, const uint32_t *sequences, size_t count) {
    size_t i;
    int result = specmoe_check_(stream, sequences, count, SPECMOE_WANT_WITHIN_);
    if (!result) result = specmoe_named_(stream, SPECMOE_END_, sequences, count);
    for (i = 0; i < count && !result; i++) stream->slots[sequences[i]].seen = SPECMOE_IDLE_;
    return result;
}

static inline int specmoe_ask(specmoe_stream *stream, const uint32_t *sequences, size_t count) {
    size_t i;
    int result = specmoe_check_(stream, sequences, count, SPECMOE_WANT_WITHIN_);
    if (!result) result = specmoe_named_(stream, SPECMOE_ASK_, sequences, count);
    for (i = 0; i < count && !result; i++) stream->slots[sequences[i]].due = stream->slots[sequences[i]].seen;
    return result;
}

/* ---- Listening -------------------------------------------------------------------------------------------------- */

static inline int specmoe_poll(specmoe_stream *stream) {
    return stream->gone ? SPECMOE_GONE : specmoe_receive_(stream);
}

/* Take in what has come. `slot`: of the sequence. */
static inline int specmoe_look_(specmoe_stream *stream, uint32_t sequence, const specmoe_slot_ **slot) {
    int result = specmoe_check_(stream, &sequence, 1, SPECMOE_WANT_OPEN_);
    if (!result) result = specmoe_receive_(stream);
    if (result) return result;
    *slot = &stream->slots[sequence];
    return (*slot)->seen == SPECMOE_FORGOTTEN_ ? specmoe_lost_(stream, sequence) : SPECMOE_OK;
}

static inline int specmoe_hand_over_(const specmoe_stream *stream, uint32_t sequence,
                                     specmoe_forecast *forecast) {
    const specmoe_slot_ *slot = &stream->slots[sequence];
    size_t row = (size_t)sequence * (size_t)stream->status.num_layers;
    forecast->token = slot->started - 1;
    forecast->first_layer = slot->first_layer;
    forecast->layers = slot->layers;
    forecast->width = slot->width;
    forecast->sizes = stream->sizes + row;
    forecast->experts = stream->experts + row * (size_t)stream->most_width;
    forecast->probabilities = stream->probabilities + row * (size_t)stream->most_width;
    return 1;
}

static inline int specmoe_latest(specmoe_stream *stream, uint32_t sequence, specmoe_forecast *forecast) {
    const specmoe_slot_ *slot = NULL;
    int result;
    memset(forecast, 0, sizeof *forecast);
    result = specmoe_look_(stream, sequence, &slot);
    if (result) return result;
    return slot->seen >= 0 && slot->has ? specmoe_hand_over_(stream, sequence, forecast) : 0;
}

static inline int specmoe_wait(specmoe_stream *stream, uint32_t sequence, int64_t timeout_us,
                               specmoe_forecast *forecast) {
    int64_t end_us = specmoe_now_us_() + timeout_us;
    memset(forecast, 0, sizeof *forecast);
    for (;;) {
        const specmoe_slot_ *slot = NULL;
        int64_t left_us;
        int result = specmoe_look_(stream, sequence, &slot);
        if (result) return result;
        if (slot->seen < 0 || slot->due < 0) return 0;
        if (slot->has && slot->first_layer >= slot->due)
            return specmoe_hand_over_(stream, sequence, forecast);
        left_us = end_us - specmoe_now_us_();
        if (left_us <= 0) return 0;
        specmoe_sleep_(stream->descriptor, 1, stream->out_begin < stream->out_end, left_us);
    }
}

#ifdef __cplusplus
}
#endif
#endif
