/* The whole C interface of pyfasa, written once: the C++ core includes this file through fasa.h, and cffi
 * generates the Python binding from the same text. Declarations and comments only, no preprocessor.
 *
 * Shapes are innermost first, as in ggml.h. A cell is one slot of the KV cache. Words:
 *   fc       frequency chunk: the two dims of a head that RoPE rotates together (FASA, arXiv 2602.03152, 3.1)
 *   block    64 consecutive cells, the unit of the side index
 *   visible  bit c of word b is set when the mask lets the query row see cell 64 b + c
 */

/* ---- status ------------------------------------------------------------------------------------------- */

typedef enum fasa_status {
    FASA_STATUS_OK       = 0,
    FASA_STATUS_ARGUMENT = 1, /* a value out of its range: ValueError in Python */
    FASA_STATUS_HOST     = 2, /* this build of llama.cpp cannot be decorated */
    FASA_STATUS_MEMORY   = 3, /* an allocation failed */
    FASA_STATUS_STATE    = 4  /* a call at a time when it makes no sense */
} fasa_status;

/* One sentence about the last failure on this thread; never NULL. */
const char * fasa_last_error(void);

/* ---- constants ---------------------------------------------------------------------------------------- */

typedef enum fasa_constant {
    FASA_BLOCK_CELLS  = 64, /* cells of an index block */
    FASA_PEAKS        = 8,  /* peaks of a block: peak g is the best score of cells 64 b + 8 i + g */
    FASA_MAX_HEAD_DIM = 256,
    FASA_MAX_GROUP    = 64, /* query heads of one KV head */
    FASA_MAX_ROWS     = 64  /* query rows of one stream that a decode step may have */
} fasa_constant;

typedef enum fasa_rope {
    FASA_ROPE_NORM = 0, /* fc i is dims (2i, 2i+1) */
    FASA_ROPE_NEOX = 2  /* fc i is dims (i, i + n_rot/2); dims past n_rot pair up as (2i, 2i+1) in both */
} fasa_rope;

typedef enum fasa_kv_type { /* the values of ggml_type */
                            FASA_KV_F32    = 0,
                            FASA_KV_F16    = 1,
                            FASA_KV_Q4_0   = 2,
                            FASA_KV_Q4_1   = 3,
                            FASA_KV_Q5_0   = 6,
                            FASA_KV_Q5_1   = 7,
                            FASA_KV_Q8_0   = 8,
                            FASA_KV_IQ4_NL = 20,
                            FASA_KV_BF16   = 30
} fasa_kv_type;

/* Bytes of a row of n values, n a multiple of 32; 0 for a type without a kernel. */
int64_t fasa_kv_row_bytes(int32_t kv_type, int64_t n);

/* rows u8 [row_bytes, n_rows], out f32 [n, n_rows]: K or V rows of any type of the cache as floats. */
fasa_status fasa_kv_to_float(int32_t kv_type, const void * rows, int64_t n, int64_t n_rows, float * out);

typedef enum fasa_isa {
    FASA_ISA_REFERENCE = 0, /* plain loops, double accumulators */
    FASA_ISA_PORTABLE  = 1,
    FASA_ISA_AVX2      = 2, /* AVX2, FMA, F16C */
    FASA_ISA_AVX512    = 3, /* AVX-512 F, BW, DQ, VL and VNNI */
    FASA_ISA_COUNT     = 4,
    FASA_ISA_AUTO      = -1
} fasa_isa;

/* Best instruction set of this CPU; names for printing; 1 when this CPU and build can run it. */
int32_t      fasa_isa_best(void);
const char * fasa_isa_name(int32_t isa);
int32_t      fasa_isa_usable(int32_t isa);

/* ---- layout: what the side index keeps of one KV head -------------------------------------------------- */

/* A row keeps n_fc chunks, each with 1, 2, 4 or 8 bits per dim. Chunks of equal bits form a segment; a segment has
 * one step per cell, a byte. A dim x is stored as code u with  (x - center) / scale ~ step * (u - (2^bits - 1) / 2). */
typedef struct fasa_layout fasa_layout;

/* fc     u16  [n_fc]      chunk ids, all below head_dim / 2, no duplicate
 * bits   u8   [n_fc]      1, 2, 4 or 8
 * center f32  [head_dim]  or NULL for zeros; shifts every score of a query equally, so it never changes a ranking
 * scale  f32  [head_dim]  or NULL for ones
 * requires: head_dim even, 2..256; n_rot even, 2..head_dim */
fasa_status fasa_layout_create(int32_t head_dim, int32_t n_rot, int32_t rope, int32_t n_fc, const uint16_t * fc,
                               const uint8_t * bits, const float * center, const float * scale, fasa_layout ** out);
void        fasa_layout_free(fasa_layout * layout);
int64_t     fasa_layout_block_bytes(const fasa_layout * layout); /* bytes of one block of 64 cells */

/* ---- the stages, as pure functions -------------------------------------------------------------------- */

/* Writes the index entries of n cells.
 * rows  f32  [head_dim, n]           keys of this KV head, in the basis in which RoPE acts (Hadamard undone)
 * cells i64  [n]                     where they go
 * index u8   [block_bytes, n_block]  changed in place; neighbours of a cell keep their entries */
fasa_status fasa_index_write(const fasa_layout * layout, const float * rows, const int64_t * cells, int64_t n,
                             uint8_t * index);

/* score: for each query head of one KV head, the dot product with every cell's index row (the paper's TIP, eq. 5).
 * q       f32  [head_dim, n_q]            same basis as the rows
 * index   u8   [block_bytes, n_block]
 * visible u64  [n_block]
 * scores  f32  [64 * n_block, n_q]  out   -inf where not visible
 * peaks   f32  [8 * n_block, n_q]   out
 * Blocks b0 <= b < b1 are written, the others left alone. */
fasa_status fasa_score(int32_t isa, const fasa_layout * layout, const float * q, int32_t n_q, const uint8_t * index,
                       const uint64_t * visible, int64_t n_block, int64_t b0, int64_t b1, float * scores,
                       float * peaks);

/* select: the `budget` best cells, ascending by cell; all visible cells when there are no more than that.
 * Every selected score is >= every visible score left out; ties are broken in favour of lower cells.
 * scores  f32  [64 * n_block]
 * peaks   f32  [8 * n_block]
 * scratch f32  [64 * n_block]
 * cells   i32  [64 * n_block]  out; the first *n_selected count */
fasa_status fasa_select(int32_t isa, const float * scores, const float * peaks, int64_t n_block, int64_t budget,
                        float * scratch, int32_t * cells, int64_t * n_selected);

/* The K and V of one KV head as they lie in the cache. */
typedef struct fasa_kv {
    const void *     k; /* cell 0 */
    const void *     v;
    int64_t          k_stride; /* bytes from cell to cell */
    int64_t          v_stride;
    int32_t          k_type; /* fasa_kv_type */
    int32_t          v_type;
    int32_t          k_dim; /* a multiple of 32 up to 256 */
    int32_t          v_dim;
    float            scale;
    float            softcap; /* 0: none */
    const uint16_t * mask;    /* f16 [n_kv], or NULL; added to the scaled scores */
} fasa_kv;

/* attend: exact softmax attention of one query over n cells (the paper's FAC, eq. 7), unnormalized.
 * q     f32  [k_dim]      in the basis of the cache
 * cells i32  [n]
 * m, d  running maximum and denominator; o f32 [v_dim] running sum of weight * V.
 * Start with m = -inf, d = 0, o = 0; call again to go on; the result is o / d. */
fasa_status fasa_attend(int32_t isa, const fasa_kv * kv, const float * q, const int32_t * cells, int64_t n, float * m,
                        float * d, float * o);

/* n normalized fast Walsh-Hadamard transforms in place, on n * size floats; size a power of two. Own inverse. */
fasa_status fasa_hadamard(float * x, int64_t n, int32_t size);

/* ---- plan: may a node be replaced? --------------------------------------------------------------------- */

typedef enum fasa_reason {
    FASA_REASON_SPARSE        = 0,  /* replaced: score, select, attend */
    FASA_REASON_DISABLED      = 1,  /* switched off by the caller */
    FASA_REASON_PREFILL       = 2,  /* more query rows than a decode step has */
    FASA_REASON_SHORT_CONTEXT = 3,  /* fewer visible cells than min_ctx */
    FASA_REASON_NO_PROFILE    = 4,  /* the profile keeps no chunk for this layer */
    FASA_REASON_SHAPE         = 5,  /* heads or head size are not the profile's */
    FASA_REASON_ALIBI         = 6,  /* position bias besides RoPE */
    FASA_REASON_MASK          = 7,  /* no mask, or one that cannot be read before the graph runs */
    FASA_REASON_KV_TYPE       = 8,  /* K or V type without a kernel */
    FASA_REASON_KV_MEMORY     = 9,  /* cache in memory that this backend has no kernel for */
    FASA_REASON_NO_CACHE      = 10, /* K is not a view of a KV cache tensor */
    FASA_REASON_N_KV_MAX      = 11, /* a model trained sparse: upstream's own selection */
    FASA_REASON_STREAMS       = 12, /* cache streams that do not start where the cache says, or captured */
    FASA_REASON_NO_MEMORY     = 13, /* the side index could not be allocated */
    FASA_REASON_CAPTURE       = 14, /* replaced by exact attention while queries are captured */
    FASA_REASON_SWA           = 15, /* a sliding window: dense already reads few cells */
    FASA_REASON_CACHE_VIEWS   = 16, /* another node of the graph views the same cache in another shape */
    FASA_REASON_COUNT         = 17
} fasa_reason;

const char * fasa_reason_name(int32_t reason); /* "short_context" */
const char * fasa_reason_text(int32_t reason); /* a sentence */

/* ---- profile and configuration ------------------------------------------------------------------------- */

/* Layers may have fewer KV heads than n_head_kv: the rows of the others are not used.
 * chunks u16  [n_ranked, n_head_kv, n_layer]  ranked best first; n_fc can be lowered at run time
 * bits   u8   [n_ranked, n_head_kv, n_layer]  1, 2, 4 or 8; 0: this and all later ranks are unused
 * center f32  [head_dim, n_head_kv, n_layer]  or NULL
 * scale  f32  [head_dim, n_head_kv, n_layer]  or NULL */
typedef struct fasa_profile {
    int32_t          n_layer;
    int32_t          n_head_kv;
    int32_t          head_dim;
    int32_t          n_rot;
    int32_t          rope; /* fasa_rope */
    int32_t          n_ranked;
    const uint16_t * chunks;
    const uint8_t *  bits;
    const float *    center;
    const float *    scale;
} fasa_profile;

/* What tells a profile's model from others; n_head and n_head_kv are the largest of all layers. */
typedef struct fasa_model {
    int32_t n_layer;
    int32_t n_head;
    int32_t n_head_kv;
    int32_t head_dim;
    int32_t n_rot;
    int32_t rope; /* fasa_rope */
    double  rope_freq_base;
} fasa_model;

/* The largest version of a profile in a file that is known. */
typedef enum fasa_profile_version { FASA_PROFILE_VERSION = 1 } fasa_profile_version;

/* A profile in a GGUF file: one of its own, or a model file that carries it. */
typedef struct fasa_profile_file fasa_profile_file;

fasa_status          fasa_profile_file_open(const char * path, fasa_profile_file ** out);
const fasa_profile * fasa_profile_file_profile(const fasa_profile_file * file); /* lives as long as the file */
const fasa_model *   fasa_profile_file_model(const fasa_profile_file * file);
const char *         fasa_profile_file_name(const fasa_profile_file * file); /* of the model */
int32_t              fasa_profile_file_n_fc(const fasa_profile_file * file); /* chunks in use by default */
void                 fasa_profile_file_free(fasa_profile_file * file);

typedef struct fasa_config {
    int32_t enabled;
    int32_t budget;     /* cells attended per query head; at least 1 */
    int32_t n_fc;       /* chunks of the profile in use; 0: all ranked */
    int32_t bits;       /* 1, 2, 4 or 8 for all chunks in use; 0: those of the profile */
    int32_t min_ctx;    /* visible cells of its longest row below which a node stays dense */
    int32_t max_rows;   /* query rows per stream above which a node is prefill; 0..64 */
    int32_t sinks;      /* first visible cells in the order of writing, always selected */
    int32_t recent;     /* last ones, likewise; sinks + recent <= budget */
    int32_t verify;     /* recompute the index before each use and compare */
    int32_t capture;    /* keep the queries of each node, see fasa_session_captured */
    int32_t isa;        /* fasa_isa; AUTO in production */
    int32_t n_threads;  /* of the context's threads, how many work on a replaced node; 0: all */
    int32_t head_start; /* a token on a GPU may begin before llama.cpp has set all inputs; the results are the same */
} fasa_config;

/* What a setting is when nobody says. min_ctx is PAYS_FROM budgets: from there on selecting cells is faster than dense
 * attention; on a GPU see fasa_pays_from_cuda. */
typedef enum fasa_default {
    FASA_DEFAULT_BUDGET   = 1024,
    FASA_DEFAULT_MAX_ROWS = 8,
    FASA_DEFAULT_SINKS    = 4,
    FASA_DEFAULT_RECENT   = 32,
    FASA_PAYS_FROM        = 2
} fasa_default;

/* The same in budgets where a CUDA device attends, whose dense attention is fast (docs/cuda.md). It reads a row of K or
 * V once for a group of query heads, of which each selects rows of its own. */
int32_t fasa_pays_from_cuda(int32_t k_type, int32_t group);

/* FASA_STATUS_ARGUMENT with a sentence about the first setting that is out of its range. */
fasa_status fasa_config_check(const fasa_config * config);

/* ---- session: one llama_context ------------------------------------------------------------------------ */

typedef struct fasa_session fasa_session;

typedef struct fasa_counters {
    int64_t graphs;        /* graphs seen */
    int64_t nodes[17];     /* attention nodes by fasa_reason */
    int64_t cells_visible; /* summed over sparse nodes and their query heads and rows */
    int64_t cells_attended;
    int64_t cells_indexed; /* index entries (re)written, counted once per layer */
    int64_t cells_verified;
    int64_t verify_failures;    /* entries that differed from the K cache; anything but 0 is a bug */
    int64_t stale_events;       /* K changed by other means than SET_ROWS */
    int64_t index_bytes;        /* allocated now */
    int64_t kv_bytes;           /* K and V of the same layers, as allocated */
    int64_t bytes_scored;       /* index bytes read */
    int64_t bytes_attended;     /* K and V bytes read */
    int64_t head_starts;        /* tokens that began before all of their inputs were set, on a GPU */
    int64_t head_starts_undone; /* of these, how many had been given others than llama.cpp then set, and began anew */
} fasa_counters;

typedef struct fasa_timings { /* ns on the first worker thread, summed over sparse nodes */
    int64_t index;
    int64_t score;
    int64_t select;
    int64_t attend;
    int64_t wait;  /* for the other threads */
    int64_t plan;  /* in the decorator, once per graph */
    int64_t total; /* inside graph_compute, of graphs with sparse nodes */
} fasa_timings;

/* Version of ggml that this library was built against, and of the one in this process. */
const char * fasa_ggml_built(void);
const char * fasa_ggml_loaded(void);

/* 1 when decode graphs of llama.cpp's CUDA devices are served, else 0; and a sentence about it. */
int32_t      fasa_cuda_usable(void);
const char * fasa_cuda_text(void);

/* Proves that the CPU backend can be decorated: checks the internal structs, runs one small attention graph on a
 * decorated backend, and compares it with the undecorated one. Nothing stays decorated. */
fasa_status fasa_self_test(void);

/* Copies the arrays. profile may be NULL: then every node stays dense and queries can be captured. */
fasa_status fasa_session_create(const fasa_profile * profile, const fasa_config * config, fasa_session ** out);

/* Between arm and disarm, backends that this thread creates belong to the session: call around the creation of
 * one llama_context. The device is decorated while any session lives, other threads' backends stay untouched. */
fasa_status fasa_session_arm(fasa_session * session);
fasa_status fasa_session_disarm(fasa_session * session);
int32_t     fasa_session_backends(const fasa_session * session); /* decorated backends alive */

/* Takes effect with the next graph; side indexes are rebuilt when the profile or n_fc changed. */
fasa_status fasa_session_set_profile(fasa_session * session, const fasa_profile * profile); /* NULL: dense */
fasa_status fasa_session_configure(fasa_session * session, const fasa_config * config);
fasa_status fasa_session_counters(const fasa_session * session, fasa_counters * out);
fasa_status fasa_session_timings(const fasa_session * session, fasa_timings * out);
fasa_status fasa_session_reset(fasa_session * session); /* counters and timings to zero */

/* The side index is dropped and rebuilt from the K cache at the next use. */
fasa_status fasa_session_invalidate(fasa_session * session);

/* ---- scores from outside, for evaluation ---- */

/* One query row of a replaced node, in place of score. Keys and queries are in the basis in which RoPE acts. */
typedef struct fasa_scoring {
    int32_t          layer, head_dim, n_head, n_head_kv;
    int64_t          n_block;       /* blocks up to the last visible cell */
    int64_t          n_cell;        /* cells that have keys, at most 64 * n_block */
    int64_t          first_changed; /* keys before this cell are those of the layer's last call */
    int64_t          key_stride;    /* floats from a KV head to the next */
    const float *    q;             /* f32 [head_dim, n_head] */
    const float *    keys;          /* f32 [head_dim, n_cell, n_head_kv] */
    const uint64_t * visible;       /* u64 [n_block] */
    float *          scores;        /* f32 [64 * n_block, n_head] out, -inf before; what hidden cells get is ignored */
} fasa_scoring;

/* 0, or anything else for a failure: the row then attends to all that it sees. Called on a worker thread inside the
 * decode call, where the session cannot be asked anything. */
typedef int32_t (*fasa_scorer)(void * user, const fasa_scoring * scoring);

/* From the next graph on; NULL: the side index scores again. A profile is needed all the same. */
fasa_status fasa_session_set_scorer(fasa_session * session, fasa_scorer scorer, void * user);

/* Captured queries of a layer since the last clear: RoPE basis, oldest row first.
 * out f32 [head_dim, n_head, n_rows]; NULL asks for the sizes only. */
fasa_status fasa_session_captured(const fasa_session * session, int32_t layer, int32_t * head_dim, int32_t * n_head,
                                  int64_t * n_rows, float * out);
fasa_status fasa_session_captured_clear(fasa_session * session);

/* Keys of cells c0 <= c < c1 of a layer that has computed a node, dequantized, in the RoPE basis.
 * out f32 [head_dim, n_head_kv, c1 - c0]; NULL asks for the sizes only. */
fasa_status fasa_session_keys(const fasa_session * session, int32_t layer, int64_t c0, int64_t c1, int32_t * head_dim,
                              int32_t * n_head_kv, float * out);

/* Undecorates what is left of it and frees it. Safe before or after the llama_context is freed. */
void fasa_session_free(fasa_session * session);

/* ---- fault injection, for tests ------------------------------------------------------------------------- */

/* The next `successes` allocations of side indexes and work space succeed, all later ones fail; -1: none fails. */
void fasa_fail_allocations(int64_t successes);
