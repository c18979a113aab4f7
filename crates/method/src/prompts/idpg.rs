//! IDPG, instance-dependent prompt generation: a small network makes each sequence's prompt from what the frozen model says
//! of it.
//!
//! P(x) = W₂·GELU(W₁·z + b₁) + b₂, read as [tokens, width]; z is what the head of the frozen model reads of the sequence in
//! a first pass without the adapter. With `deep` every block reads a prompt of its own in place of the rows before: W₁, b₁
//! and W₂ are shared, b₂ has a part for each block. W is a matrix, or a sum of Kronecker products (PHM)
//! Σⱼ Sⱼ⊗Tⱼ, Sⱼ [n, n]. Dropout on z and after GELU. The rows come before the first token, as all prompts here.
//!
//! Wu et al. 2022, arXiv:2204.04497; starts as in the authors' code: PHM N(0, 0.05), dense N(0, 0.02), b₂ of several blocks
//! or of PHM uniform in ±½.
//!
//! idpg_down.weight [bottleneck, z] and idpg_up.weight [tokens·width, bottleneck], or `.rule` [n, n, n] and `.weight`
//! [n, bottleneck/n, z/n], [n, tokens·width/n, bottleneck/n]; idpg_down.bias `[bottleneck]`, idpg_up.bias
//! [blocks or 1, tokens·width].

use std::sync::Arc;

use engraft_nn::{
    Adapter, BlockPatch, Builder, Error, Init, Kind, Output, Pass, Patch, PromptPatch, Result, Site, SiteId,
    Task,
};
use engraft_tensor::ops::Unary;
use engraft_tensor::{Param, Tensor, no_grad};
use serde_json::{Map, Value, json};

use super::prompt::{TOKENS_MAX, prompt_site};
use crate::read::{Reader, as_written};
use crate::shared::fields::{choice, flag, float, int};
use crate::shared::kronecker::multiply_full;
use crate::shared::sequences::{self, Summary, is_prompted, with_first_rows};
use crate::{Described, Entry, Info, Loaded, Method, peft};

const SIZE_MAX: usize = 1 << 20;

#[derive(Clone, Debug)]
struct Idpg {
    tokens: usize,
    bottleneck: usize,
    /// n of the Kronecker products; `None` for matrices.
    phm: Option<usize>,
    deep: bool,
    from: Option<Summary>,
    dropout: f32,
}

static INFO: Info = Info {
    name: "idpg",
    title: "IDPG",
    class: "prompt",
    sites: "prompt, block",
    paper: "arXiv:2204.04497",
    summary: "a prompt made for each sequence from what a first, frozen pass says of it",
    mergeable: false,
    identity_at_init: false,
    default_roles: None,
    peft_type: "ENGRAFT_IDPG",
    fields: &[
        int("tokens", (1, TOKENS_MAX as i64), Some("5"), "Number of rows, of each block where deep."),
        choice("generator", &["phm", "dense"], "\"phm\"", "Sums of Kronecker products, or matrices."),
        int("phm_dim", (1, 1024), Some("16"), "Products in the sum, and the size of their left factors."),
        int("bottleneck", (1, SIZE_MAX as i64), None, "Inner size of the generator; 16, and 256 for dense."),
        flag("deep", "true", "Give every block rows of its own."),
        sequences::field(
            None,
            "Which token's state stands for a sequence; last for causal language models, else first. Tokens that are to be predicted are not read.",
        ),
        float("dropout", (0.0, 0.999), "0.1", "Dropout inside the generator, while training."),
    ],
};

/// In the registry.
pub static ENTRY: Entry = Entry { info: &INFO, from_settings, from_file, example };

fn read(r: &mut Reader<'_>) -> Idpg {
    let dense = r.one_of("generator", &[("phm", false), ("dense", true)]);
    let n = r.count("phm_dim", 16, 1024);
    Idpg {
        tokens: r.count("tokens", 5, TOKENS_MAX),
        bottleneck: r.count("bottleneck", if dense { 256 } else { 16 }, SIZE_MAX),
        phm: (!dense).then_some(n),
        deep: r.flag("deep", true),
        from: Summary::read(r),
        dropout: r.dropout("dropout"),
    }
}

fn from_settings(settings: &Map<String, Value>) -> Result<Box<dyn Method>> {
    peft::own_settings(&INFO, settings, read)
}

fn from_file(config: &Value) -> Result<Option<Loaded>> {
    peft::own_file(&INFO, config, read)
}

fn example() -> Box<dyn Method> {
    Box::new(Idpg { tokens: 2, bottleneck: 4, phm: Some(2), deep: true, from: None, dropout: 0.0 })
}

impl Method for Idpg {
    fn info(&self) -> &'static Info {
        &INFO
    }

    fn formula(&self) -> Option<&'static str> {
        Some("2·phm_dim^3 + bottleneck·(d + tokens·d)/phm_dim + bottleneck + L·tokens·d")
    }

    fn attach(&self, b: &mut Builder<'_>) -> Result<()> {
        let (prompt, width) = prompt_site(b.sites(), INFO.title)?;
        let own = b.sites().of_kind(|k| matches!(k, Kind::Block { .. })).filter(|s| s.stack == prompt.stack);
        let blocks: Vec<SiteId> = if self.deep { own.map(|s| s.id).collect() } else { vec![] };
        let of_head = |s: &Site| match s.kind {
            Kind::Head { inn, .. } => Some(inn),
            _ => None,
        };
        let read = b.sites().iter().find_map(of_head).unwrap_or(width);
        let generator = Arc::new(Generator {
            down: self.matrix(b, "idpg_down", (self.bottleneck, read))?,
            down_bias: b.param("idpg_down.bias", &[self.bottleneck], self.start(Init::Zeros))?,
            up: self.matrix(b, "idpg_up", (self.tokens * width, self.bottleneck))?,
            up_bias: b.param(
                "idpg_up.bias",
                &[blocks.len().max(1), self.tokens * width],
                if self.phm.is_none() && !self.deep { Init::Zeros } else { Init::Uniform(0.5) },
            )?,
            method: self.clone(),
            width,
            summary: self.summary(b.info().task),
            site: prompt.id,
            rows: format!("{}idpg.rows", b.prefix()),
        });
        let of = |layer: usize| Box::new(Rows { generator: generator.clone(), layer });
        b.patch(prompt.id, Patch::Prompt(of(0)))?;
        for (layer, block) in blocks.into_iter().enumerate().skip(1) {
            b.patch(block, Patch::Block(of(layer)))?;
        }
        Ok(())
    }

    fn before_forward(
        &self,
        _adapter: &Arc<Adapter>,
        first: &dyn Fn() -> Result<Output>,
        cx: &Pass,
    ) -> Result<()> {
        // The prompts of text that is gone on with lie in its cache.
        if cx.continues() {
            return Ok(());
        }
        let out = no_grad(first)?;
        let per_sequence = out.features.dim(0) == cx.layout().sequences().len();
        // Which of them is usual, only the model tells.
        for summary in self.from.map_or(vec![Summary::First, Summary::Last], |from| vec![from]) {
            let z = if per_sequence { out.features.clone() } else { summary.of(&out.features, &out.pass)? };
            cx.put(said(summary), z.detach());
        }
        Ok(())
    }

    fn config(&self, model: &Described<'_>) -> Map<String, Value> {
        let mut own = json!({
            "bottleneck": self.bottleneck, "deep": self.deep, "dropout": as_written(self.dropout),
            "summary": self.summary(model.info.task).name(), "generator": if self.phm.is_some() { "phm" } else { "dense" },
            "tokens": self.tokens,
        });
        if let Some(n) = self.phm {
            own["phm_dim"] = n.into();
        }
        own.as_object().cloned().unwrap_or_default()
    }
}

/// What the first pass is left as.
fn said(summary: Summary) -> String {
    format!("idpg.{}", summary.name())
}

impl Idpg {
    fn summary(&self, task: Task) -> Summary {
        self.from.unwrap_or(Summary::usual(task))
    }

    /// N(0, 0.05) in PHM, `dense` elsewhere.
    fn start(&self, dense: Init) -> Init {
        if self.phm.is_some() { Init::Normal(0.05) } else { dense }
    }

    fn matrix(&self, b: &mut Builder<'_>, name: &str, (out, inn): (usize, usize)) -> Result<Matrix> {
        let weight = format!("{name}.weight");
        let Some(n) = self.phm else {
            return Ok(Matrix { rule: None, weight: b.param(&weight, &[out, inn], Init::Normal(0.02))? });
        };
        if !out.is_multiple_of(n) || !inn.is_multiple_of(n) {
            return Err(Error::Unsupported(format!(
                "a matrix [{out}, {inn}] of IDPG has no {n} equal parts; choose a `phm_dim` that divides both, or `generator = \"dense\"`"
            )));
        }
        let rule = b.param(&format!("{name}.rule"), &[n, n, n], Init::Normal(0.05))?;
        let parts = b.param(&weight, &[n, out / n, inn / n], Init::Normal(0.05))?;
        Ok(Matrix { rule: Some(rule), weight: parts })
    }
}

/// W, or what it is made of.
struct Matrix {
    rule: Option<Param>,
    weight: Param,
}

impl Matrix {
    /// x·Wᵀ.
    fn multiply(&self, x: &Tensor) -> Result<Tensor> {
        match &self.rule {
            Some(rule) => multiply_full(x, &rule.get(), &self.weight.get()),
            None => Ok(x.matmul_t(&self.weight.get())?),
        }
    }
}

struct Generator {
    down: Matrix,
    down_bias: Param,
    up: Matrix,
    up_bias: Param,
    method: Idpg,
    width: usize,
    summary: Summary,
    site: SiteId,
    /// Where the rows without b₂ are left for the blocks.
    rows: String,
}

impl Generator {
    /// W₂·GELU(W₁·z + b₁) [sequences, tokens·width], which all blocks share.
    fn shared(&self, cx: &Pass) -> Result<Tensor> {
        let Some(z) = cx.find_sequences(&said(self.summary))? else {
            let message =
                "IDPG needs a first pass of the model without the adapter, which this pass did not have";
            return Err(Error::Unsupported(message.into()));
        };
        let drop = |x: &Tensor, salt: u8| cx.dropout(x, self.method.dropout, self.site, salt);
        let z = drop(&z, 0)?;
        let inner = self.down.multiply(&z)?.add(&self.down_bias.get())?.unary(Unary::Gelu)?;
        self.up.multiply(&drop(&inner, 1)?)
    }

    /// [sequences · tokens, width], those of block `layer`.
    fn of_layer(&self, shared: &Tensor, layer: usize) -> Result<Tensor> {
        let bias = self.up_bias.get().rows_between(layer, layer + 1)?;
        Ok(shared.add(&bias)?.reshape([shared.dim(0) * self.method.tokens, self.width])?)
    }
}

/// The rows of one block.
struct Rows {
    generator: Arc<Generator>,
    layer: usize,
}

impl PromptPatch for Rows {
    fn count(&self) -> usize {
        self.generator.method.tokens
    }

    fn rows(&self, _embedded: &Tensor, cx: &Pass) -> Result<Tensor> {
        let shared = self.generator.shared(cx)?;
        cx.put(self.generator.rows.clone(), shared.clone());
        self.generator.of_layer(&shared, self.layer)
    }
}

impl BlockPatch for Rows {
    fn around(
        &self,
        h: &Tensor,
        run: &dyn Fn(&Tensor, &Pass) -> Result<Tensor>,
        _site: &Site,
        cx: &Pass,
    ) -> Result<Tensor> {
        let count = self.generator.method.tokens;
        let prompted = (0..cx.layout().sequences().len()).any(|i| is_prompted(cx, i, count));
        let Some(shared) = cx.find(&self.generator.rows).filter(|_| prompted) else { return run(h, cx) };
        run(&with_first_rows(h, &self.generator.of_layer(&shared, self.layer)?, count, cx)?, cx)
    }
}

#[cfg(test)]
mod tests {
    use super::*;
    use crate::testing::*;
    use engraft_nn::Layout;
    use engraft_tensor::testing::{close, sample};

    fn small(more: Value) -> crate::Chosen {
        let all = with(json!({ "tokens": 2, "bottleneck": 4, "phm_dim": 2, "dropout": 0.0 }), more);
        chosen("idpg", all)
    }

    /// The prompt of two sequences of which the frozen model says z.
    fn rows(a: &crate::Attached, z: &Tensor) -> Result<Tensor> {
        let (sites, _) = toy();
        let [Patch::Prompt(p)] = a.adapter.at(site_id(&sites, "tok.prompt")) else { panic!() };
        let cx = Pass::new(Layout::counted(&[2, 3])?, None);
        if z.dim(0) == 2 {
            cx.put("idpg.last", z.clone());
        }
        p.rows(&sample(&[5, 6], 1), &cx)
    }

    #[test]
    fn each_sequence_has_the_prompt_that_its_words_make() {
        let a = attached(&[small(json!({}))], &[]);
        // 2n³ + bottleneck·z/n + bottleneck·t·d/n + bottleneck + blocks·t·d.
        assert_eq!(a.adapter.trained_count(), 2 * 8 + 4 * 6 / 2 + 4 * 12 / 2 + 4 + 2 * 12);
        stir(&a, 0.5);
        let z = sample(&[2, 6], 3);
        let both = rows(&a, &z).unwrap();
        assert_eq!(both.shape(), [4, 6]);
        let twice = z.gather(&Tensor::from_i64(vec![1, 1], [2]).unwrap()).unwrap();
        let other = rows(&a, &twice).unwrap();
        close(&other.narrow(0, 0, 2).unwrap(), &both.narrow(0, 2, 2).unwrap(), 1e-6);
        let error = rows(&a, &sample(&[1, 6], 3)).unwrap_err().to_string();
        assert!(error.contains("first pass"), "{error}");
    }

    #[test]
    fn without_its_second_matrix_it_is_prompt_tuning() {
        for generator in ["phm", "dense"] {
            let a = attached(&[small(json!({ "generator": generator, "deep": false }))], &[]);
            stir(&a, 0.5);
            let up = param(&a.adapter, "idpg_up.weight");
            up.set(Tensor::zeros(up.value().shape())).unwrap();
            let bias = value_of(&a, "idpg_up.bias").reshape([2, 6]).unwrap();
            let expected = engraft_tensor::ops::cat(&[&bias, &bias], 0).unwrap();
            close(&rows(&a, &sample(&[2, 6], 3)).unwrap(), &expected, 0.0);
        }
    }

    #[test]
    fn configurations() {
        survives_saving(&[small(json!({}))], &["head"]);
        survives_saving(&[small(json!({ "generator": "dense", "deep": false, "summary": "mean" }))], &[]);
        let (sites, info) = toy();
        let uneven = crate::attach(&[small(json!({ "phm_dim": 5 }))], &[], &sites, &info, 1);
        let error = uneven.map(|_| ()).unwrap_err().to_string();
        assert!(error.contains("phm_dim") && error.contains("dense"), "{error}");
        let good = config(&[small(json!({}))], &[]);
        for bad in [json!({ "generator": "rnn" }), json!({ "tokens": 0 }), json!({ "summary": "middle" })] {
            assert!(from_file(&with(good.clone(), bad.clone())).is_err(), "{bad}");
        }
    }
}
