//! From the tensor names of the original code (latent-diffusion, OpenCLIP) to
//! those of diffusers and transformers, which our networks ask for. Only names:
//! nothing here opens a file or knows a size.

use hypergen_tensor::{Part, Renamed};

/// A name of the original UNet, below `model.diffusion_model.`; `layers` are
/// the residual blocks of each level going down. `None`: no such tensor belongs
/// to a UNet.
pub(super) fn unet(name: &str, layers: usize) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    Some(match parts.as_slice() {
        ["time_embed", "0", leaf] => format!("time_embedding.linear_1.{leaf}"),
        ["time_embed", "2", leaf] => format!("time_embedding.linear_2.{leaf}"),
        ["label_emb", "0", "0", leaf] => format!("add_embedding.linear_1.{leaf}"),
        ["label_emb", "0", "2", leaf] => format!("add_embedding.linear_2.{leaf}"),
        ["out", "0", leaf] => format!("conv_norm_out.{leaf}"),
        ["out", "2", leaf] => format!("conv_out.{leaf}"),
        ["middle_block", "0", inner @ ..] => format!("mid_block.resnets.0.{}", resnet(inner)?),
        ["middle_block", "1", inner @ ..] => format!("mid_block.attentions.0.{}", inner.join(".")),
        ["middle_block", "2", inner @ ..] => format!("mid_block.resnets.1.{}", resnet(inner)?),
        ["input_blocks", "0", "0", leaf] => format!("conv_in.{leaf}"),
        ["input_blocks", i, inner @ ..] => {
            // A level has its residual blocks and then the convolution that halves.
            let i = i.parse::<usize>().ok()?.checked_sub(1)?;
            let (level, j) = (i / (layers + 1), i % (layers + 1));
            match inner {
                ["0", "op", leaf] => format!("down_blocks.{level}.downsamplers.0.conv.{leaf}"),
                ["0", inner @ ..] => format!("down_blocks.{level}.resnets.{j}.{}", resnet(inner)?),
                ["1", inner @ ..] => format!("down_blocks.{level}.attentions.{j}.{}", inner.join(".")),
                _ => return None,
            }
        }
        ["output_blocks", i, inner @ ..] => {
            let i = i.parse::<usize>().ok()?;
            let (level, j) = (i / (layers + 1), i % (layers + 1));
            match inner {
                // After the attention, or in its place where there is none.
                ["1" | "2", "conv", leaf] => format!("up_blocks.{level}.upsamplers.0.conv.{leaf}"),
                ["0", inner @ ..] => format!("up_blocks.{level}.resnets.{j}.{}", resnet(inner)?),
                ["1", inner @ ..] => format!("up_blocks.{level}.attentions.{j}.{}", inner.join(".")),
                _ => return None,
            }
        }
        _ => return None,
    })
}

/// A name below one of the UNet's residual blocks.
fn resnet(parts: &[&str]) -> Option<String> {
    Some(match parts {
        ["in_layers", "0", leaf] => format!("norm1.{leaf}"),
        ["in_layers", "2", leaf] => format!("conv1.{leaf}"),
        ["emb_layers", "1", leaf] => format!("time_emb_proj.{leaf}"),
        ["out_layers", "0", leaf] => format!("norm2.{leaf}"),
        ["out_layers", "3", leaf] => format!("conv2.{leaf}"),
        ["skip_connection", leaf] => format!("conv_shortcut.{leaf}"),
        _ => return None,
    })
}

/// A name of the original autoencoder of so many levels, below `first_stage_model.`.
pub(super) fn vae(name: &str, levels: usize) -> Option<String> {
    let parts: Vec<&str> = name.split('.').collect();
    let block = |inner: &[&str]| inner.join(".").replace("nin_shortcut", "conv_shortcut");
    Some(match parts.as_slice() {
        ["quant_conv" | "post_quant_conv", _] => name.to_owned(),
        [half @ ("encoder" | "decoder"), rest @ ..] => {
            let inner = match rest {
                ["conv_in" | "conv_out", _] => rest.join("."),
                ["norm_out", leaf] => format!("conv_norm_out.{leaf}"),
                ["mid", "block_1", inner @ ..] => format!("mid_block.resnets.0.{}", block(inner)),
                ["mid", "block_2", inner @ ..] => format!("mid_block.resnets.1.{}", block(inner)),
                ["mid", "attn_1", which, leaf] => {
                    let which = match *which {
                        "norm" => "group_norm",
                        "q" => "to_q",
                        "k" => "to_k",
                        "v" => "to_v",
                        "proj_out" => "to_out.0",
                        _ => return None,
                    };
                    format!("mid_block.attentions.0.{which}.{leaf}")
                }
                ["down", i, "block", j, inner @ ..] => {
                    format!("down_blocks.{i}.resnets.{j}.{}", block(inner))
                }
                ["down", i, "downsample", "conv", leaf] => {
                    format!("down_blocks.{i}.downsamplers.0.conv.{leaf}")
                }
                // The original counts levels from the finest on the way up, too.
                ["up", i, "block", j, inner @ ..] => {
                    format!("up_blocks.{}.resnets.{j}.{}", mirrored(i, levels)?, block(inner))
                }
                ["up", i, "upsample", "conv", leaf] => {
                    format!("up_blocks.{}.upsamplers.0.conv.{leaf}", mirrored(i, levels)?)
                }
                _ => return None,
            };
            format!("{half}.{inner}")
        }
        _ => return None,
    })
}

fn mirrored(level: &str, levels: usize) -> Option<usize> {
    levels.checked_sub(1)?.checked_sub(level.parse().ok()?)
}

/// A tensor `from` of OpenCLIP's text encoder, whose name below the encoder's
/// prefix is `name`. Nothing, where inference has no use for it.
pub(super) fn open_clip(from: &str, name: &str) -> Option<Vec<Renamed>> {
    let one = |to: String, part: Part| vec![Renamed { to, from: from.to_owned(), part }];
    let parts: Vec<&str> = name.split('.').collect();
    Some(match parts.as_slice() {
        ["positional_embedding"] => one("embeddings.position_embedding.weight".into(), Part::Whole),
        ["token_embedding", "weight"] => one("embeddings.token_embedding.weight".into(), Part::Whole),
        ["ln_final", leaf] => one(format!("final_layer_norm.{leaf}"), Part::Whole),
        // OpenCLIP multiplies from the other side.
        ["text_projection"] => one("text_projection.weight".into(), Part::Transposed),
        ["logit_scale" | "attn_mask"] => vec![],
        ["transformer", "resblocks", i, inner @ ..] => {
            let layer = format!("encoder.layers.{i}");
            match inner {
                ["ln_1", leaf] => one(format!("{layer}.layer_norm1.{leaf}"), Part::Whole),
                ["ln_2", leaf] => one(format!("{layer}.layer_norm2.{leaf}"), Part::Whole),
                ["mlp", "c_fc", leaf] => one(format!("{layer}.mlp.fc1.{leaf}"), Part::Whole),
                ["mlp", "c_proj", leaf] => one(format!("{layer}.mlp.fc2.{leaf}"), Part::Whole),
                ["attn", "out_proj", leaf] => one(format!("{layer}.self_attn.out_proj.{leaf}"), Part::Whole),
                // Query, key and value lie in one matrix, in this order.
                ["attn", joined] => {
                    let leaf = joined.strip_prefix("in_proj_")?;
                    (0..3)
                        .map(|index| Renamed {
                            to: format!("{layer}.self_attn.{}_proj.{leaf}", ["q", "k", "v"][index]),
                            from: from.to_owned(),
                            part: Part::Rows { index, of: 3 },
                        })
                        .collect()
                }
                _ => return None,
            }
        }
        _ => return None,
    })
}

#[cfg(test)]
mod tests {
    //! A sample of each rule; whole checkpoints are the goldens' business.
    use super::*;

    #[test]
    fn names_of_the_unet() {
        for (from, to) in [
            ("time_embed.2.bias", "time_embedding.linear_2.bias"),
            ("input_blocks.0.0.weight", "conv_in.weight"),
            ("input_blocks.1.0.in_layers.0.weight", "down_blocks.0.resnets.0.norm1.weight"),
            ("input_blocks.3.0.op.bias", "down_blocks.0.downsamplers.0.conv.bias"),
            ("input_blocks.4.0.skip_connection.weight", "down_blocks.1.resnets.0.conv_shortcut.weight"),
            ("input_blocks.5.1.proj_in.weight", "down_blocks.1.attentions.1.proj_in.weight"),
            ("middle_block.2.emb_layers.1.weight", "mid_block.resnets.1.time_emb_proj.weight"),
            ("output_blocks.2.1.conv.weight", "up_blocks.0.upsamplers.0.conv.weight"),
            ("output_blocks.5.2.conv.weight", "up_blocks.1.upsamplers.0.conv.weight"),
            ("output_blocks.5.1.norm.bias", "up_blocks.1.attentions.2.norm.bias"),
            ("label_emb.0.2.weight", "add_embedding.linear_2.weight"),
            ("out.2.weight", "conv_out.weight"),
        ] {
            assert_eq!(unet(from, 2).as_deref(), Some(to));
        }
        for foreign in ["joint_blocks.0.x", "input_blocks.x.0.weight", "input_blocks.1.3.weight", "", "out"] {
            assert_eq!(unet(foreign, 2), None, "{foreign}");
        }
    }

    #[test]
    fn names_of_the_autoencoder() {
        for (from, to) in [
            (
                "decoder.up.0.block.2.nin_shortcut.weight",
                "decoder.up_blocks.3.resnets.2.conv_shortcut.weight",
            ),
            ("decoder.up.3.upsample.conv.bias", "decoder.up_blocks.0.upsamplers.0.conv.bias"),
            ("encoder.down.1.downsample.conv.bias", "encoder.down_blocks.1.downsamplers.0.conv.bias"),
            ("decoder.mid.attn_1.proj_out.weight", "decoder.mid_block.attentions.0.to_out.0.weight"),
            ("post_quant_conv.bias", "post_quant_conv.bias"),
        ] {
            assert_eq!(vae(from, 4).as_deref(), Some(to));
        }
        for foreign in ["decoder.up.4.block.0.x", "loss.logvar", "decoder.mid.attn_1.gate.weight"] {
            assert_eq!(vae(foreign, 4), None, "{foreign}");
        }
    }

    #[test]
    fn names_of_open_clip() {
        let joined = open_clip("p.in", "transformer.resblocks.7.attn.in_proj_bias").expect("a known name");
        assert_eq!(joined[2].to, "encoder.layers.7.self_attn.v_proj.bias");
        assert_eq!(joined[2].part, Part::Rows { index: 2, of: 3 });
        assert_eq!(open_clip("p", "text_projection").expect("known")[0].part, Part::Transposed);
        assert_eq!(open_clip("p", "logit_scale"), Some(vec![]));
        assert_eq!(open_clip("p", "transformer.resblocks.7.attn.gate"), None);
    }
}
