"""Types of the compiled module; tests/test_stub.py compares the names with native/fasa.cdef.h."""

from typing import Any

ffi: Any

class _Lib:
    FASA_STATUS_OK: int
    FASA_STATUS_ARGUMENT: int
    FASA_STATUS_HOST: int
    FASA_STATUS_MEMORY: int
    FASA_STATUS_STATE: int
    FASA_BLOCK_CELLS: int
    FASA_PEAKS: int
    FASA_MAX_HEAD_DIM: int
    FASA_MAX_GROUP: int
    FASA_MAX_ROWS: int
    FASA_ROPE_NORM: int
    FASA_ROPE_NEOX: int
    FASA_KV_F32: int
    FASA_KV_F16: int
    FASA_KV_Q4_0: int
    FASA_KV_Q4_1: int
    FASA_KV_Q5_0: int
    FASA_KV_Q5_1: int
    FASA_KV_Q8_0: int
    FASA_KV_IQ4_NL: int
    FASA_KV_BF16: int
    FASA_ISA_REFERENCE: int
    FASA_ISA_PORTABLE: int
    FASA_ISA_AVX2: int
    FASA_ISA_AVX512: int
    FASA_ISA_COUNT: int
    FASA_ISA_AUTO: int
    FASA_REASON_SPARSE: int
    FASA_REASON_DISABLED: int
    FASA_REASON_PREFILL: int
    FASA_REASON_SHORT_CONTEXT: int
    FASA_REASON_NO_PROFILE: int
    FASA_REASON_SHAPE: int
    FASA_REASON_ALIBI: int
    FASA_REASON_MASK: int
    FASA_REASON_KV_TYPE: int
    FASA_REASON_KV_MEMORY: int
    FASA_REASON_NO_CACHE: int
    FASA_REASON_N_KV_MAX: int
    FASA_REASON_STREAMS: int
    FASA_REASON_NO_MEMORY: int
    FASA_REASON_CAPTURE: int
    FASA_REASON_SWA: int
    FASA_REASON_CACHE_VIEWS: int
    FASA_REASON_COUNT: int
    FASA_PROFILE_VERSION: int
    FASA_DEFAULT_BUDGET: int
    FASA_DEFAULT_MAX_ROWS: int
    FASA_DEFAULT_SINKS: int
    FASA_DEFAULT_RECENT: int
    FASA_PAYS_FROM: int
    def fasa_last_error(self) -> Any: ...
    def fasa_isa_best(self) -> int: ...
    def fasa_isa_name(self, isa: int) -> Any: ...
    def fasa_isa_usable(self, isa: int) -> int: ...
    def fasa_cuda_usable(self) -> int: ...
    def fasa_cuda_text(self) -> Any: ...
    def fasa_kv_row_bytes(self, kv_type: int, n: int) -> int: ...
    def fasa_kv_to_float(self, kv_type: int, rows: Any, n: int, n_rows: int, out: Any) -> int: ...
    def fasa_layout_create(
        self,
        head_dim: int,
        n_rot: int,
        rope: int,
        n_fc: int,
        fc: Any,
        bits: Any,
        center: Any,
        scale: Any,
        out: Any,
    ) -> int: ...
    def fasa_layout_free(self, layout: Any) -> None: ...
    def fasa_layout_block_bytes(self, layout: Any) -> int: ...
    def fasa_index_write(self, layout: Any, rows: Any, cells: Any, n: int, index: Any) -> int: ...
    def fasa_score(
        self,
        isa: int,
        layout: Any,
        q: Any,
        n_q: int,
        index: Any,
        visible: Any,
        n_block: int,
        b0: int,
        b1: int,
        scores: Any,
        peaks: Any,
    ) -> int: ...
    def fasa_select(
        self,
        isa: int,
        scores: Any,
        peaks: Any,
        n_block: int,
        budget: int,
        scratch: Any,
        cells: Any,
        n_selected: Any,
    ) -> int: ...
    def fasa_attend(
        self, isa: int, kv: Any, q: Any, cells: Any, n: int, m: Any, d: Any, o: Any
    ) -> int: ...
    def fasa_hadamard(self, x: Any, n: int, size: int) -> int: ...
    def fasa_reason_name(self, reason: int) -> Any: ...
    def fasa_reason_text(self, reason: int) -> Any: ...
    def fasa_ggml_built(self) -> Any: ...
    def fasa_ggml_loaded(self) -> Any: ...
    def fasa_self_test(self) -> int: ...
    def fasa_profile_file_open(self, path: bytes, out: Any) -> int: ...
    def fasa_profile_file_profile(self, file: Any) -> Any: ...
    def fasa_profile_file_model(self, file: Any) -> Any: ...
    def fasa_profile_file_name(self, file: Any) -> Any: ...
    def fasa_profile_file_n_fc(self, file: Any) -> int: ...
    def fasa_profile_file_free(self, file: Any) -> None: ...
    def fasa_config_check(self, config: Any) -> int: ...
    def fasa_pays_from_cuda(self, k_type: int, group: int) -> int: ...
    def fasa_session_create(self, profile: Any, config: Any, out: Any) -> int: ...
    def fasa_session_arm(self, session: Any) -> int: ...
    def fasa_session_disarm(self, session: Any) -> int: ...
    def fasa_session_backends(self, session: Any) -> int: ...
    def fasa_session_set_profile(self, session: Any, profile: Any) -> int: ...
    def fasa_session_configure(self, session: Any, config: Any) -> int: ...
    def fasa_session_counters(self, session: Any, out: Any) -> int: ...
    def fasa_session_timings(self, session: Any, out: Any) -> int: ...
    def fasa_session_reset(self, session: Any) -> int: ...
    def fasa_session_invalidate(self, session: Any) -> int: ...
    def fasa_session_set_scorer(self, session: Any, scorer: Any, user: Any) -> int: ...
    def fasa_session_captured(
        self, session: Any, layer: int, head_dim: Any, n_head: Any, n_rows: Any, out: Any
    ) -> int: ...
    def fasa_session_captured_clear(self, session: Any) -> int: ...
    def fasa_session_keys(
        self,
        session: Any,
        layer: int,
        c0: int,
        c1: int,
        head_dim: Any,
        n_head_kv: Any,
        out: Any,
    ) -> int: ...
    def fasa_session_free(self, session: Any) -> None: ...
    def fasa_fail_allocations(self, successes: int) -> None: ...

lib: _Lib
