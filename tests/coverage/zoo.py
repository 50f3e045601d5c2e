"""The coverage list: the architectures that docs/models.md counts."""

from __future__ import annotations

import plain
from architectures import VOCABULARY, Architecture, images, masked_tokens, signal, timm, together, tokens, torchvision, transformers
from torch import nn
from torchvision_models import declare_operations

_TEXT = {"vocab_size": VOCABULARY, "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4}
_ENCODER = _TEXT | {"intermediate_size": 128, "max_position_embeddings": 40}
_DECODER = _ENCODER | {"use_cache": False, "num_key_value_heads": 4}
_VISION = {"hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "image_size": 32, "patch_size": 8}
_SPEECH = {
    "hidden_size": 32, "num_hidden_layers": 2, "num_attention_heads": 4, "intermediate_size": 128, "conv_dim": (16, 16, 16),
    "conv_kernel": (10, 3, 3), "conv_stride": (5, 2, 2), "num_feat_extract_layers": 3, "num_conv_pos_embeddings": 8,
    "num_conv_pos_embedding_groups": 2,
}  # fmt: skip
_WHISPER = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "num_mel_bins": 20, "max_source_positions": 30,
    "max_target_positions": 20, "use_cache": False, "pad_token_id": 0, "bos_token_id": 1, "eos_token_id": 2, "decoder_start_token_id": 1,
}  # fmt: skip
_SEQ2SEQ = {
    "vocab_size": VOCABULARY, "d_model": 32, "encoder_layers": 2, "decoder_layers": 2, "encoder_attention_heads": 4,
    "decoder_attention_heads": 4, "encoder_ffn_dim": 128, "decoder_ffn_dim": 128, "max_position_embeddings": 40, "use_cache": False,
}  # fmt: skip


def maxvit() -> nn.Module:
    declare_operations()
    from torchvision.models.maxvit import MaxVit

    return MaxVit((64, 64), 16, 2, [16, 32], [1, 1], 8, 0.0, num_classes=10)


TORCHVISION = (
    torchvision("alexnet", 96),
    torchvision("vgg11_bn"),
    torchvision("squeezenet1_1", 96),
    torchvision("resnet18"),
    torchvision("resnet50"),
    torchvision("resnext50_32x4d"),
    torchvision("densenet121"),
    torchvision("googlenet", 96, aux_logits=False, init_weights=False),
    torchvision("inception_v3", 128, aux_logits=False, init_weights=False),
    torchvision("mobilenet_v2"),
    torchvision("mobilenet_v3_small"),
    torchvision("mnasnet0_5"),
    torchvision("shufflenet_v2_x0_5"),
    torchvision("efficientnet_b0"),
    torchvision("efficientnet_v2_s"),
    torchvision("regnet_y_400mf"),
    torchvision("regnet_x_400mf"),
    torchvision("convnext_tiny"),
    torchvision("swin_t"),
    torchvision("swin_v2_t"),
    torchvision("vit_b_32", 64, image_size=64),
    Architecture("maxvit", "torchvision", maxvit, images(64)),
    torchvision("lraspp_mobilenet_v3_large", weights_backbone=None),
    torchvision("deeplabv3_mobilenet_v3_large", weights_backbone=None),
    torchvision("r3d_18", inputs=signal(3, 4, 32, 32)),
)

TIMM = (
    timm("resnetv2_50"),
    timm("resnest14d"),
    timm("skresnet18"),
    timm("res2net50_26w_4s"),
    timm("cspresnet50"),
    timm("cspdarknet53"),
    timm("ese_vovnet19b_dw"),
    timm("dla34"),
    timm("hrnet_w18_small"),
    timm("nf_regnet_b0"),
    timm("repvgg_a0"),
    timm("mobileone_s0"),
    timm("ghostnet_100"),
    timm("tf_mixnet_s"),
    timm("mobilenetv4_conv_small"),
    timm("tf_efficientnet_lite0"),
    timm("lcnet_050"),
    timm("convmixer_768_32", 56),
    timm("mixer_s32_224", 224),
    timm("resmlp_12_224", 64, img_size=64),
    timm("gmlp_ti16_224", 64, img_size=64),
    timm("poolformer_s12"),
    timm("vit_tiny_patch16_224", 64, img_size=64),
    timm("deit_tiny_distilled_patch16_224", 64, img_size=64),
    timm("beit_base_patch16_224", 64, img_size=64, depth=2),
    timm("cait_xxs24_224", 64, img_size=64),
    timm("swin_tiny_patch4_window7_224", 224, depths=(1, 1, 1, 1)),
    timm("pvt_v2_b0"),
    timm("twins_svt_small", 64, img_size=64),
    timm("mobilevit_xxs"),
    timm("edgenext_xx_small"),
    timm("levit_128s", 224),
    timm("efficientformer_l1", 224),
    timm("fastvit_t8"),
    timm("coatnet_nano_rw_224", 224),
)

TRANSFORMERS = (
    transformers("bert", "BertModel", "BertConfig", tokens(12), **_ENCODER),
    transformers("bert, masked", "BertForSequenceClassification", "BertConfig", masked_tokens(12), **_ENCODER),
    transformers(
        "distilbert", "DistilBertModel", "DistilBertConfig", tokens(12),
        vocab_size=VOCABULARY, dim=32, n_layers=2, n_heads=4, hidden_dim=128, max_position_embeddings=40,
    ),
    transformers("roberta", "RobertaModel", "RobertaConfig", tokens(12), **_ENCODER),
    transformers("electra", "ElectraModel", "ElectraConfig", tokens(12), embedding_size=16, **_ENCODER),
    transformers("albert", "AlbertModel", "AlbertConfig", tokens(12), embedding_size=16, **_ENCODER),
    transformers("mpnet", "MPNetModel", "MPNetConfig", tokens(12), **_ENCODER),
    transformers("deberta-v2", "DebertaV2Model", "DebertaV2Config", tokens(12), **_ENCODER),
    transformers(
        "gpt2", "GPT2LMHeadModel", "GPT2Config", tokens(12), vocab_size=VOCABULARY, n_embd=32, n_layer=2, n_head=4, use_cache=False
    ),
    transformers(
        "opt", "OPTModel", "OPTConfig", tokens(12), vocab_size=VOCABULARY, hidden_size=32, num_hidden_layers=2, num_attention_heads=4,
        ffn_dim=128, max_position_embeddings=40, word_embed_proj_dim=32, use_cache=False,
    ),
    transformers("llama", "LlamaForCausalLM", "LlamaConfig", tokens(12), **_DECODER),
    transformers("llama, shared keys", "LlamaModel", "LlamaConfig", tokens(12), **_DECODER | {"num_key_value_heads": 2}),
    transformers("qwen2", "Qwen2Model", "Qwen2Config", tokens(12), **_DECODER),
    transformers("phi", "PhiModel", "PhiConfig", tokens(12), **_DECODER),
    transformers(
        "t5 encoder", "T5EncoderModel", "T5Config", tokens(12), vocab_size=VOCABULARY, d_model=32, d_kv=8, d_ff=128, num_layers=2,
        num_heads=4,
    ),
    transformers("bart", "BartModel", "BartConfig", tokens(12), **_SEQ2SEQ),
    transformers("vit", "ViTModel", "ViTConfig", images(32), **_VISION),
    transformers("deit", "DeiTModel", "DeiTConfig", images(32), **_VISION),
    transformers("dinov2", "Dinov2Model", "Dinov2Config", images(32), **_VISION),
    transformers(
        "segformer", "SegformerForSemanticSegmentation", "SegformerConfig", images(64),
        depths=[1, 1, 1, 1], hidden_sizes=[16, 16, 32, 32], num_attention_heads=[1, 2, 2, 4], decoder_hidden_size=32,
    ),
    transformers("wav2vec2", "Wav2Vec2Model", "Wav2Vec2Config", signal(1600), **_SPEECH),
    transformers("hubert", "HubertModel", "HubertConfig", signal(1600), **_SPEECH),
    transformers("whisper encoder", "WhisperModel", "WhisperConfig", signal(20, 60), part="encoder", **_WHISPER),
    transformers("whisper", "WhisperModel", "WhisperConfig", together(signal(20, 60), masked_tokens(8)), **_WHISPER),
    transformers(
        "clip vision", "CLIPVisionModel", "CLIPVisionConfig", images(32), **_VISION,
    ),
)  # fmt: skip

PLAIN = (
    Architecture("u-net", "torch.nn", plain.UNet, images(32)),
    Architecture("u-net, upsampling", "torch.nn", plain.UpsamplingUNet, images(32)),
    Architecture("dcgan generator", "torch.nn", plain.Generator, signal(32)),
    Architecture("temporal convolutions", "torch.nn", plain.temporal, signal(20, 48)),
    Architecture("speech tagger (LSTM)", "torch.nn", plain.SpeechTagger, signal(20, 48)),
    Architecture("recommender", "torch.nn", plain.Recommender, together(tokens(1), tokens(1))),
    Architecture("nn.TransformerEncoder", "torch.nn", lambda: plain.encoder(False), signal(9, 32)),
    Architecture("nn.TransformerEncoder, norm first", "torch.nn", lambda: plain.encoder(True), signal(9, 32)),
)

HELD_OUT = (
    timm("xcit_nano_12_p16_224", 64, img_size=64, held_out=True),
    timm("focalnet_tiny_srf", 64, held_out=True),
    timm("visformer_tiny", 224, held_out=True),
    transformers("gpt-neox", "GPTNeoXModel", "GPTNeoXConfig", tokens(12), held_out=True, **_ENCODER, use_cache=False),
    transformers("convbert", "ConvBertModel", "ConvBertConfig", tokens(12), held_out=True, embedding_size=32, **_ENCODER),
)

ARCHITECTURES = (*TORCHVISION, *TIMM, *TRANSFORMERS, *PLAIN, *HELD_OUT)
