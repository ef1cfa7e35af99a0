//! The transformer inside a UNet's levels (diffusers' `Transformer2DModel`
//! of `BasicTransformerBlock`s).

use hypergen_tensor::ops::{self, Columns, Epilogue};
use hypergen_tensor::{Activation, CheckpointError, GegluProjection, Linear, Norm, Tensor, Weights};

/// Sizes of a [`Transformer`].
#[derive(Debug, Clone, Copy)]
pub(crate) struct TransformerConfig {
    pub(crate) channels: usize,
    pub(crate) heads: usize,
    pub(crate) layers: usize,
    /// Width of the text embeddings.
    pub(crate) context: usize,
    pub(crate) groups: usize,
}

/// Keys and values of one request's texts for every cross attention of a UNet, in
/// the order in which its blocks were loaded. They do not depend on the latents,
/// so they are computed once a request, not once a step.
#[derive(Default)]
pub(crate) struct TextKeysValues(pub(crate) Vec<Tensor>);

/// The texts of the requests that share a pass, in the order of their rows.
/// Each may have its own number of tokens.
pub(crate) type Texts<'a> = [&'a TextKeysValues];

/// Normalised pixels become tokens, attend to each other and to the text, and
/// are added to the picture.
pub(crate) struct Transformer {
    norm: Norm,
    proj_in: Linear,
    blocks: Vec<Block>,
    proj_out: Linear,
    groups: usize,
}

impl Transformer {
    /// `cross` counts the cross attentions loaded so far.
    pub(crate) fn load(
        w: &Weights<'_>,
        c: TransformerConfig,
        cross: &mut usize,
    ) -> Result<Self, CheckpointError> {
        // A convolutional projection is a 1x1 convolution and a linear one a
        // matrix: in NHWC they are the same product, so both load alike.
        let blocks = (0..c.layers)
            .map(|i| Block::load(&w.pp("transformer_blocks").pp(i), c, cross))
            .collect::<Result<_, _>>()?;
        Ok(Self {
            norm: w.pp("norm").norm(c.channels, 1e-6)?,
            proj_in: w.pp("proj_in").linear(c.channels, c.channels, true)?,
            blocks,
            proj_out: w.pp("proj_out").linear(c.channels, c.channels, true)?,
            groups: c.groups,
        })
    }

    /// Appends the keys and values of `text`, `[n, tokens, context]`.
    pub(crate) fn text_keys_values(&self, text: &Tensor, into: &mut TextKeysValues) {
        into.0.extend(self.blocks.iter().map(|b| ops::linear(text, &b.attn2_kv, Epilogue::default())));
    }

    /// `x` is `[n, h, w, channels]`.
    pub(crate) fn forward(&self, x: &Tensor, text: &Texts<'_>) -> Tensor {
        let [n, h, w, c] = x.nhwc();
        let tokens = ops::group_norm(x, &self.norm, self.groups, Activation::None);
        let mut tokens = ops::linear(&tokens.reshape([n, h * w, c]), &self.proj_in, Epilogue::default());
        for block in &self.blocks {
            tokens = block.forward(tokens, text); // [n, h * w, c]
        }
        ops::linear(&tokens, &self.proj_out, Epilogue::residual(x)).reshape([n, h, w, c])
    }
}

/// Self attention, cross attention and a gated feed-forward layer, each on a
/// normalised input and added to it.
struct Block {
    norm1: Norm,
    attn1_qkv: Linear,
    attn1_out: Linear,
    norm2: Norm,
    attn2_q: Linear,
    attn2_kv: Linear,
    attn2_out: Linear,
    norm3: Norm,
    ff_in: GegluProjection,
    ff_out: Linear,
    heads: usize,
    /// Place of this block's entry in [`TextKeysValues`].
    cross: usize,
}

impl Block {
    fn load(w: &Weights<'_>, c: TransformerConfig, cross: &mut usize) -> Result<Self, CheckpointError> {
        let d = c.channels;
        let (attn1, attn2, ff) = (w.pp("attn1"), w.pp("attn2"), w.pp("ff").pp("net"));
        let index = *cross;
        *cross += 1;
        Ok(Self {
            norm1: w.pp("norm1").norm(d, 1e-5)?,
            attn1_qkv: Weights::linear_stacked(&["to_q", "to_k", "to_v"].map(|p| attn1.pp(p)), d, d, false)?,
            attn1_out: attn1.pp("to_out").pp(0).linear(d, d, true)?,
            norm2: w.pp("norm2").norm(d, 1e-5)?,
            attn2_q: attn2.pp("to_q").linear(d, d, false)?,
            attn2_kv: Weights::linear_stacked(&["to_k", "to_v"].map(|p| attn2.pp(p)), c.context, d, false)?,
            attn2_out: attn2.pp("to_out").pp(0).linear(d, d, true)?,
            norm3: w.pp("norm3").norm(d, 1e-5)?,
            ff_in: ff.pp(0).pp("proj").geglu(d, 4 * d)?,
            ff_out: ff.pp(2).linear(4 * d, d, true)?,
            heads: c.heads,
            cross: index,
        })
    }

    fn forward(&self, x: Tensor, text: &Texts<'_>) -> Tensor {
        let d = x.shape().last();
        let head_dim = d / self.heads;
        let h = ops::layer_norm(&x, &self.norm1);
        let qkv = ops::linear(&h, &self.attn1_qkv, Epilogue::default()); // [n, tokens, 3 d]
        let part = |i| Columns { tensor: &qkv, offset: i * d };
        let h = ops::attention(part(0), part(1), part(2), self.heads, head_dim, false);
        let x = ops::linear(&h, &self.attn1_out, Epilogue::residual(&x));

        let h = ops::layer_norm(&x, &self.norm2);
        let q = ops::linear(&h, &self.attn2_q, Epilogue::default());
        let keys_values = text.iter().map(|text| {
            let tensor = &text.0[self.cross]; // [rows of the request, text tokens, 2 d]
            (Columns { tensor, offset: 0 }, Columns { tensor, offset: d })
        });
        let h = ops::cross_attention((&q).into(), keys_values, self.heads, head_dim);
        let x = ops::linear(&h, &self.attn2_out, Epilogue::residual(&x));

        let h = ops::layer_norm(&x, &self.norm3);
        let h = ops::geglu(&h, &self.ff_in); // [n, tokens, 4 d]
        ops::linear(&h, &self.ff_out, Epilogue::residual(&x))
    }
}
