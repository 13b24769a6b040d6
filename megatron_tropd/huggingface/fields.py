"""Fields of config.json: those that our models support, those without effect, and those of other models only."""

from __future__ import annotations

from typing import Any

SIZE_FIELDS = (
    *("hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads", "num_key_value_heads"),
    *("vocab_size", "max_position_embeddings"),
)
UNDERSTOOD_FIELDS = {
    *(*SIZE_FIELDS, "head_dim", "hidden_act", "rms_norm_eps", "rope_parameters", "rope_scaling", "rope_theta"),
    *("attention_bias", "mlp_bias", "tie_word_embeddings", "model_type", "num_experts", "num_local_experts"),
    *("num_experts_per_tok", "moe_intermediate_size", "decoder_sparse_step", "mlp_only_layers", "norm_topk_prob"),
    *("classifier_dropout", "hidden_dropout", "n_positions"),  # of heads that are not built, and in error messages
}
# Fields of other architectures, with the values at which they change nothing. Where transformers' class of the model's
# type does not read one, a file that sets it still shows that its weights need it.
FOREIGN_FIELDS: dict[str, tuple[Any, ...]] = {
    "partial_rotary_factor": (1,),
    "rotary_pct": (1,),
    **dict.fromkeys(("attention_multiplier", "logits_scaling", "logit_scale", "embedding_multiplier"), (1,)),
    **dict.fromkeys(("residual_multiplier", "scale_emb", "scale_depth", "mup_multiplier", "width_multiplier"), (1,)),
    **dict.fromkeys(("final_logit_softcapping", "attn_logit_softcapping", "logit_cap", "query_pre_attn_scalar"), ()),
    **dict.fromkeys(("clip_qkv", "attention_chunk_size", "no_rope_layer_interval", "attn_temperature_tuning"), ()),
    **dict.fromkeys(("use_qk_norm", "qk_layernorm", "qk_norm", "attention_sinks", "alibi", "parallel_attn"), (False,)),
    **dict.fromkeys(("lm_head_bias", "attention_out_bias", "qkv_bias", "use_mrope", "shared_expert"), (False,)),
    **dict.fromkeys(("n_shared_experts", "num_shared_experts", "shared_expert_intermediate_size"), (0,)),
    **dict.fromkeys(("num_nextn_predict_layers", "kv_lora_rank", "q_lora_rank", "first_k_dense_replace"), (0,)),
    "routed_scaling_factor": (1,),
    **dict.fromkeys(("rope_interleaved", "rope_interleave"), (False,)),
    "hidden_activation": ("silu", "swish"),
}
# What changes neither the function nor any shape: names, versions, defaults of training and of generation, and the
# ends of text, which tokenizers/end_of_text.py reads. The context length rotates nothing in the supported kinds of
# rope scaling.
NEUTRAL_FIELDS = {
    *("transformers_version", "_name_or_path", "name_or_path", "architectures", "torch_dtype", "dtype", "use_cache"),
    *("initializer_range", "bos_token_id", "eos_token_id", "pad_token_id", "attention_dropout", "max_window_layers"),
    *("output_attentions", "output_hidden_states", "output_router_logits", "router_aux_loss_coef", "return_dict"),
    *("router_jitter_noise", "pretraining_tp", "max_position_embeddings", "_attn_implementation_autoset", "auto_map"),
    *("id2label", "label2id", "num_labels", "problem_type", "chunk_size_feed_forward", "is_encoder_decoder"),
    *(
        "use_sliding_window",
        "sliding_window",
        "layer_types",
        "tokenizer_class",
        "task_specific_params",
        "unsloth_fixed",
    ),
    *("torchscript", "use_bfloat16", "finetuning_task", "prefix", "sep_token_id", "decoder_start_token_id"),
    *("_attn_implementation", "_attn_implementation_internal", "attn_implementation", "_flash_attn_2_enabled"),
    *("pruned_heads", "tf_legacy_loss", "cross_attention_hidden_size", "add_cross_attention", "is_decoder"),
    *("tie_encoder_decoder", "max_length", "min_length", "do_sample", "temperature", "top_k", "top_p", "num_beams"),
    *("early_stopping", "num_beam_groups", "diversity_penalty", "typical_p", "repetition_penalty", "length_penalty"),
    *("no_repeat_ngram_size", "encoder_no_repeat_ngram_size", "bad_words_ids", "num_return_sequences"),
    *("output_scores", "return_dict_in_generate", "forced_bos_token_id", "forced_eos_token_id", "suppress_tokens"),
    *("remove_invalid_values", "exponential_decay_length_penalty", "begin_suppress_tokens"),
}
