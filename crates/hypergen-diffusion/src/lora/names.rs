//! How LoRA files call things. Three generations of trainers have left three
//! ways to name a module and a dozen ways to name a tensor of it:
//!
//! * kohya and LyCORIS: `lora_unet_down_blocks_0_..._to_q.lora_down.weight`,
//!   with SDXL's UNet also under the names of the original code
//!   (`input_blocks_4_1_...`);
//! * diffusers: `unet.down_blocks.0....to_q.lora.down.weight`, before that
//!   `...attn1.processor.to_q_lora.down.weight`, today `....to_q.lora_A.weight`;
//! * PEFT: `base_model.model.down_blocks.0....to_q.lora_A.weight`.
//!
//! ComfyUI adds the keys of its own checkpoints
//! (`diffusion_model.input_blocks.4.1....`, `text_encoders.clip_l.transformer....`).
//!
//! Nothing here reads a file or knows a model's weights; this is spelling.

/// The part of a model that a module belongs to.
#[derive(Debug, Clone, Copy, PartialEq, Eq, Hash, PartialOrd, Ord)]
pub(crate) enum Component {
    /// The denoising network.
    UNet,
    /// The first (or only) text encoder.
    Text,
    /// SDXL's second text encoder.
    Text2,
}

/// What a tensor is to its module.
#[derive(Debug, Clone, Copy, PartialEq, Eq, PartialOrd, Ord, Hash)]
pub(super) enum Role {
    /// LoRA's right factor, `[rank, inputs, kernel, kernel]`.
    Down,
    /// LoRA's left factor, `[outputs, rank]`.
    Up,
    /// Between both: a convolution's taps apart (CP decomposition).
    Mid,
    /// Multiplies the change, divided by the rank.
    Alpha,
    /// DoRA's lengths as LyCORIS has them: a request's scale multiplies what
    /// the whole adapter does.
    DoraScale,
    /// DoRA's lengths as PEFT has them: a request's scale multiplies the
    /// product alone.
    Magnitude,
    /// LoHa's factors, of the first product and of the second.
    HadaW1A,
    HadaW1B,
    HadaW2A,
    HadaW2B,
    /// LoHa's taps.
    HadaT1,
    HadaT2,
    /// LoKr's left side, whole or as a product.
    KronW1,
    KronW1A,
    KronW1B,
    /// LoKr's right side, whole or as a product, with its taps.
    KronW2,
    KronW2A,
    KronW2B,
    KronT2,
    /// GLoRA's factors: of what multiplies the loaded weights, and of what is added.
    GloraA1,
    GloraA2,
    GloraB1,
    GloraB2,
    /// A difference as it is, of a weight and of a bias.
    Diff,
    DiffBias,
    /// The same, under the names that normalisations have for it.
    NormWeight,
    NormBias,
    /// The bias of LoRA's left factor: scaled as the product is.
    UpBias,
}

/// Ends of tensor names, longer ones before those that they end with.
const ENDS: &[(&str, Role)] = &[
    (".lora_linear_layer.down.weight", Role::Down),
    (".lora_linear_layer.up.weight", Role::Up),
    ("_lora.down.weight", Role::Down),
    ("_lora.up.weight", Role::Up),
    (".lora.down.weight", Role::Down),
    (".lora.up.weight", Role::Up),
    (".lora_down.weight", Role::Down),
    (".lora_up.weight", Role::Up),
    (".lora_mid.weight", Role::Mid),
    (".lora_A.weight", Role::Down),
    (".lora_B.weight", Role::Up),
    ("_lora.alpha", Role::Alpha),
    (".alpha", Role::Alpha),
    (".lora_A", Role::Down),
    (".lora_B", Role::Up),
    (".lora_B.bias", Role::UpBias),
    (".dora_scale", Role::DoraScale),
    (".lora_magnitude_vector.weight", Role::Magnitude),
    (".lora_magnitude_vector", Role::Magnitude),
    (".hada_w1_a", Role::HadaW1A),
    (".hada_w1_b", Role::HadaW1B),
    (".hada_w2_a", Role::HadaW2A),
    (".hada_w2_b", Role::HadaW2B),
    (".hada_t1", Role::HadaT1),
    (".hada_t2", Role::HadaT2),
    (".lokr_w1", Role::KronW1),
    (".lokr_w1_a", Role::KronW1A),
    (".lokr_w1_b", Role::KronW1B),
    (".lokr_w2", Role::KronW2),
    (".lokr_w2_a", Role::KronW2A),
    (".lokr_w2_b", Role::KronW2B),
    (".lokr_t2", Role::KronT2),
    (".a1.weight", Role::GloraA1),
    (".a2.weight", Role::GloraA2),
    (".b1.weight", Role::GloraB1),
    (".b2.weight", Role::GloraB2),
    (".diff", Role::Diff),
    (".diff_b", Role::DiffBias),
    (".w_norm", Role::NormWeight),
    (".b_norm", Role::NormBias),
];

/// Parts of a name after which PEFT may put an adapter's own name.
const NAMED: &[(&str, Role)] =
    &[(".lora_A.", Role::Down), (".lora_B.", Role::Up), (".lora_magnitude_vector.", Role::Magnitude)];

/// Splits a tensor's name into its module's and its role; `None` where that is
/// not understood.
pub(super) fn split(key: &str) -> Option<(&str, Role)> {
    let plain = ENDS.iter().find_map(|(end, role)| Some((key.strip_suffix(end)?, *role)));
    let named = || {
        NAMED.iter().find_map(|(part, role)| {
            let (module, rest) = key.rsplit_once(part)?;
            let bias = rest.strip_suffix(".bias").filter(|_| *role == Role::Up);
            let role = if bias.is_some() { Role::UpBias } else { *role };
            let adapter = bias.unwrap_or_else(|| rest.strip_suffix(".weight").unwrap_or(rest));
            let one_word = !adapter.is_empty() && !adapter.contains('.') && adapter != "bias";
            one_word.then_some((module, role))
        })
    };
    plain.or_else(named).filter(|(module, _)| !module.is_empty())
}

/// An embedding in a LoRA file (`bundle_emb.NAME.VECTORS`): its name, and that
/// of its vectors.
pub(super) fn bundled(key: &str) -> Option<(&str, &str)> {
    let (name, vectors) = key.strip_prefix("bundle_emb.")?.split_once('.')?;
    (!name.is_empty()).then_some((name, vectors))
}

/// A module as it is looked up: the part of the model, if the name says so,
/// and the path in it with `_` for every `.`, so that all ways to write a name
/// are the same.
#[derive(Debug, Clone, PartialEq, Eq)]
pub(super) struct Place {
    pub(super) component: Option<Component>,
    pub(super) path: String,
}

/// Beginnings of module names, longer ones before those that they begin with.
const STARTS: &[(&str, Component)] = &[
    ("lora_unet_", Component::UNet),
    ("lora_unet.", Component::UNet),
    ("lycoris_", Component::UNet),
    ("lora_te1_", Component::Text),
    ("lora_te1.", Component::Text),
    ("lora_te2_", Component::Text2),
    ("lora_te2.", Component::Text2),
    ("lora_te_", Component::Text),
    ("lora_te.", Component::Text),
    ("unet.", Component::UNet),
    ("text_encoder_2.", Component::Text2),
    ("text_encoder.", Component::Text),
    ("text_encoders.clip_l.transformer.", Component::Text),
    ("text_encoders.clip_g.transformer.", Component::Text2),
    // SD 2.x's only one.
    ("text_encoders.clip_h.transformer.", Component::Text),
    ("clip_l.transformer.", Component::Text),
    ("clip_g.transformer.", Component::Text2),
    ("clip_h.transformer.", Component::Text),
    ("clip_l.", Component::Text),
    ("clip_g.", Component::Text2),
    ("clip_h.", Component::Text),
    ("model.diffusion_model.", Component::UNet),
    ("diffusion_model.", Component::UNet),
];

/// Reads a module's name.
pub(super) fn place(module: &str) -> Place {
    let mut rest = module;
    for wrapper in ["base_model.model.", "base_model."] {
        rest = rest.strip_prefix(wrapper).unwrap_or(rest);
    }
    let found =
        STARTS.iter().find_map(|(start, component)| Some((rest.strip_prefix(start)?, Some(*component))));
    let (rest, component) = found.unwrap_or((rest, None));
    // A text encoder inside of a pipeline's prefix may have PEFT's as well.
    let rest = rest.strip_prefix("base_model.model.").unwrap_or(rest);
    Place { component, path: path(rest) }
}

/// The path of a module in the form in which it is looked up.
pub(super) fn path(module: &str) -> String {
    let flat = module.replace(".processor.", ".").replace('.', "_");
    flat.strip_prefix("text_model_").unwrap_or(&flat).to_owned()
}

/// Older names of a path's last part, each with today's.
const OLDER: &[(Component, &str, &str)] = &[
    (Component::UNet, "_to_out", "_to_out_0"),
    (Component::Text, "_to_q", "_q_proj"),
    (Component::Text, "_to_k", "_k_proj"),
    (Component::Text, "_to_v", "_v_proj"),
    (Component::Text, "_to_out", "_out_proj"),
];

/// What an older path is called today, if it is one.
pub(super) fn newer(component: Component, path: &str) -> Option<String> {
    let same = |c: Component| (c == Component::UNet) == (component == Component::UNet);
    OLDER
        .iter()
        .filter(|(c, ..)| same(*c))
        .find_map(|(_, old, new)| Some(format!("{}{new}", path.strip_suffix(old)?)))
}

/// A UNet module's path in the original code (`ldm` and `sgm`), from its name
/// in diffusers. `layers` is the number of residual blocks of a level on the
/// way down; `attends` says whether a level of the way up has attention.
pub(super) fn original_path(name: &str, layers: usize, attends: impl Fn(usize) -> bool) -> Option<String> {
    let whole = [
        ("conv_in", "input_blocks_0_0"),
        ("conv_norm_out", "out_0"),
        ("conv_out", "out_2"),
        ("time_embedding.linear_1", "time_embed_0"),
        ("time_embedding.linear_2", "time_embed_2"),
        ("add_embedding.linear_1", "label_emb_0_0"),
        ("add_embedding.linear_2", "label_emb_0_2"),
    ];
    if let Some((_, original)) = whole.iter().find(|(ours, _)| *ours == name) {
        return Some((*original).to_owned());
    }
    let parts: Vec<&str> = name.split('.').collect();
    let number = |i: usize| parts.get(i)?.parse::<usize>().ok();
    let (block, rest) = match *parts.first()? {
        "down_blocks" => {
            let (level, index) = (number(1)?, number(3)?);
            let block = 1 + level * (layers + 1);
            match *parts.get(2)? {
                "resnets" => (format!("input_blocks_{}_0", block + index), 4),
                "attentions" => (format!("input_blocks_{}_1", block + index), 4),
                "downsamplers" => return Some(format!("input_blocks_{}_0_op", block + layers)),
                _ => return None,
            }
        }
        "mid_block" => match (*parts.get(1)?, number(2)?) {
            ("resnets", i) => (format!("middle_block_{}", 2 * i), 3),
            ("attentions", _) => ("middle_block_1".to_owned(), 3),
            _ => return None,
        },
        "up_blocks" => {
            let (level, index) = (number(1)?, number(3)?);
            let block = level * (layers + 1);
            match *parts.get(2)? {
                "resnets" => (format!("output_blocks_{}_0", block + index), 4),
                "attentions" => (format!("output_blocks_{}_1", block + index), 4),
                "upsamplers" => {
                    let place = 1 + usize::from(attends(level));
                    return Some(format!("output_blocks_{}_{place}_conv", block + layers));
                }
                _ => return None,
            }
        }
        _ => return None,
    };
    let inner = parts[rest..].join("_");
    let inner = match inner.as_str() {
        // An attention block's own normalisations have longer names here.
        "norm1" => "in_layers_0",
        "norm2" => "out_layers_0",
        "conv1" => "in_layers_2",
        "conv2" => "out_layers_3",
        "time_emb_proj" => "emb_layers_1",
        "conv_shortcut" => "skip_connection",
        other => other,
    };
    Some(format!("{block}_{inner}"))
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn every_way_to_write_a_name_leads_to_one_place() {
        let unet = "down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q";
        let text = "encoder_layers_3_self_attn_q_proj";
        for (key, component, path, role) in [
            (
                "lora_unet_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q.lora_down.weight",
                Some(Component::UNet),
                unet,
                Role::Down,
            ),
            (
                "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora.up.weight",
                Some(Component::UNet),
                unet,
                Role::Up,
            ),
            (
                "unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q_lora.up.weight",
                Some(Component::UNet),
                unet,
                Role::Up,
            ),
            (
                "down_blocks.0.attentions.1.transformer_blocks.0.attn1.processor.to_q_lora.down.weight",
                None,
                unet,
                Role::Down,
            ),
            (
                "base_model.model.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_A.weight",
                None,
                unet,
                Role::Down,
            ),
            (
                "base_model.model.unet.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_B.style.weight",
                Some(Component::UNet),
                unet,
                Role::Up,
            ),
            (
                "lora_te_text_model_encoder_layers_3_self_attn_q_proj.alpha",
                Some(Component::Text),
                text,
                Role::Alpha,
            ),
            (
                "lora_te2_text_model_encoder_layers_3_self_attn_q_proj.alpha",
                Some(Component::Text2),
                text,
                Role::Alpha,
            ),
            (
                "text_encoder.text_model.encoder.layers.3.self_attn.q_proj.lora_linear_layer.up.weight",
                Some(Component::Text),
                text,
                Role::Up,
            ),
            (
                "text_encoder_2.encoder.layers.3.self_attn.q_proj.lora_magnitude_vector",
                Some(Component::Text2),
                text,
                Role::Magnitude,
            ),
            (
                "text_encoders.clip_g.transformer.text_model.encoder.layers.3.self_attn.q_proj.dora_scale",
                Some(Component::Text2),
                text,
                Role::DoraScale,
            ),
            (
                "lora_te1.text_model.encoder.layers.3.self_attn.q_proj.diff_b",
                Some(Component::Text),
                text,
                Role::DiffBias,
            ),
            (
                "base_model.model.down_blocks.0.attentions.1.transformer_blocks.0.attn1.to_q.lora_B.style.bias",
                None,
                unet,
                Role::UpBias,
            ),
            (
                "lycoris_down_blocks_0_attentions_1_transformer_blocks_0_attn1_to_q.a1.weight",
                Some(Component::UNet),
                unet,
                Role::GloraA1,
            ),
        ] {
            let (module, found) = split(key).unwrap_or_else(|| panic!("{key}"));
            assert_eq!(found, role, "{key}");
            assert_eq!(place(module), Place { component, path: path.to_owned() }, "{key}");
        }
        let old = "text_encoder.text_model.encoder.layers.3.self_attn.to_q_lora.down.weight";
        let path = place(split(old).expect("an old name").0).path;
        assert_eq!(newer(Component::Text, &path).as_deref(), Some(text));
        assert_eq!(newer(Component::UNet, "attn1_to_out").as_deref(), Some("attn1_to_out_0"));
        assert_eq!(newer(Component::UNet, "attn1_to_q"), None);
    }

    #[test]
    fn what_is_no_tensor_of_an_adapter_is_not_taken_for_one() {
        for key in [
            "",
            ".alpha",
            "unet.conv_in.weight",
            ".diff",
            "x.bias",
            "x.lora_A.bias",
            "x.lora_A.default.bias",
            "x.lora_embedding_A",
            "x.bm.weight",
            "x.oft_blocks",
            "bundle_emb.x.clip_l",
        ] {
            assert_eq!(split(key), None, "{key}");
        }
    }

    #[test]
    fn an_embedding_has_a_name_and_vectors() {
        assert_eq!(bundled("bundle_emb.fox.string_to_param.*"), Some(("fox", "string_to_param.*")));
        assert_eq!(bundled("bundle_emb.fox.clip_l"), Some(("fox", "clip_l")));
        for key in ["bundle_emb.fox", "bundle_emb..clip_l", "x.bundle_emb.fox.clip_l", "bundle_emb"] {
            assert_eq!(bundled(key), None, "{key}");
        }
    }

    #[test]
    fn original_names_are_those_of_the_published_files() {
        let attends = |level: usize| level < 2;
        for (ours, original) in [
            ("conv_in", "input_blocks_0_0"),
            ("conv_norm_out", "out_0"),
            ("down_blocks.0.resnets.1.norm1", "input_blocks_2_0_in_layers_0"),
            ("mid_block.resnets.0.norm2", "middle_block_0_out_layers_0"),
            ("mid_block.attentions.0.norm", "middle_block_1_norm"),
            (
                "mid_block.attentions.0.transformer_blocks.0.norm1",
                "middle_block_1_transformer_blocks_0_norm1",
            ),
            ("down_blocks.0.downsamplers.0.conv", "input_blocks_3_0_op"),
            (
                "down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
                "input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            ),
            ("down_blocks.2.resnets.1.conv_shortcut", "input_blocks_8_0_skip_connection"),
            ("down_blocks.2.attentions.1.proj_in", "input_blocks_8_1_proj_in"),
            ("mid_block.resnets.1.time_emb_proj", "middle_block_2_emb_layers_1"),
            ("mid_block.attentions.0.proj_out", "middle_block_1_proj_out"),
            (
                "up_blocks.0.attentions.2.transformer_blocks.9.ff.net.0.proj",
                "output_blocks_2_1_transformer_blocks_9_ff_net_0_proj",
            ),
            ("up_blocks.0.upsamplers.0.conv", "output_blocks_2_2_conv"),
            ("up_blocks.2.resnets.2.conv1", "output_blocks_8_0_in_layers_2"),
            ("add_embedding.linear_2", "label_emb_0_2"),
        ] {
            assert_eq!(original_path(ours, 2, attends).as_deref(), Some(original), "{ours}");
        }
        assert_eq!(
            original_path("up_blocks.0.upsamplers.0.conv", 2, |_| false).as_deref(),
            Some("output_blocks_2_1_conv")
        );
        assert_eq!(original_path("encoder.layers.0", 2, attends), None);
    }
}
