use engraft_nn::Targets;
use engraft_tensor::testing::{close, sample};
use serde_json::json;

use super::*;
use crate::testing::{attached, chosen, frozen, stir};

/// A LoRA of the toy model with random contents.
fn term(settings: Value, weight: f64) -> Term {
    let methods = [chosen("lora", settings)];
    let a = attached(&methods, &[]);
    stir(&a, 0.3);
    let (sites, info) = crate::testing::toy();
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "base", &sites, &info).unwrap();
    Term { name: format!("weight {weight}"), config, tensors, weight }
}

fn options(rule: Rule) -> Options {
    Options { rule, rank: None, density: 0.5, sign: Sign::Total, seed: 3 }
}

/// W′ − W of q in the first layer under an adapter's file.
fn change(config: &Value, tensors: &Named) -> Tensor {
    let (sites, info) = crate::testing::toy();
    let loaded = crate::load_adapter(config, tensors.clone(), &sites, &info).unwrap();
    let merged = engraft_nn::merged_tensors(&sites, &loaded.adapter).unwrap();
    let q = merged.iter().find(|m| m.site.path == "layers.0.attn.q").unwrap();
    q.value.sub(&frozen("layers.0.attn.q")).unwrap()
}

#[test]
fn cat_is_the_exact_sum_whatever_ranks_and_scales() {
    let terms = [
        term(json!({ "rank": 2, "alpha": 3.0 }), 0.7),
        term(
            json!({ "rank": 3, "rslora": true, "rank_pattern": { "v": 1 }, "alpha_pattern": { "q": 5.0 } }),
            -0.4,
        ),
    ];
    let sum = combine(&terms, &options(Rule::Cat)).unwrap();
    let exact = terms.iter().fold(Tensor::zeros([6, 6]), |sum, t| {
        sum.add(&change(&t.config, &t.tensors).scale(t.weight as f32).unwrap()).unwrap()
    });
    close(&change(&sum.config, &sum.tensors), &exact, 1e-6);
    assert!(sum.error.unwrap() < 1e-6, "{:?}", sum.error);
    assert_eq!((&sum.config["r"], &sum.config["rank_pattern"]["layers.0.attn.v"]), (&json!(5), &json!(3)));
    // A rank as large as the sum's loses nothing, a smaller one what its singular values say.
    let whole = combine(&terms, &Options { rank: Some(5), ..options(Rule::Svd) }).unwrap();
    close(&change(&whole.config, &whole.tensors), &exact, 1e-5);
    let cut = combine(&terms, &Options { rank: Some(1), ..options(Rule::Svd) }).unwrap();
    assert!(cut.error.unwrap() > 0.05 && cut.error.unwrap() < 1.0, "{:?}", cut.error);
}

#[test]
fn a_task_that_one_adapter_alone_says_is_the_sum_s() {
    let (mut silent, telling) = (term(json!({ "rank": 1 }), 1.0), term(json!({ "rank": 1 }), 1.0));
    let task = telling.config["task_type"].clone();
    assert!(task.is_string());
    silent.config["task_type"] = Value::Null;
    let sum = combine(&[silent, telling], &options(Rule::Cat)).unwrap();
    assert_eq!(sum.config["task_type"], task);
}

#[test]
fn what_is_cut_without_a_rank_is_cut_to_the_largest_of_all_everywhere() {
    let terms =
        [term(json!({ "rank": 2 }), 0.7), term(json!({ "rank": 4, "rank_pattern": { "q": 1 } }), -0.4)];
    let sum = combine(&terms, &options(Rule::Svd)).unwrap();
    assert_eq!((&sum.config["r"], &sum.config["rank_pattern"]), (&json!(4), &json!({})));
    assert!(sum.error.unwrap() > 0.0, "the values lose what v has beyond");
}

#[test]
fn a_factor_s_weight_is_shared_and_its_sign_kept() {
    let one = [term(json!({ "rank": 2 }), -0.25)];
    for rule in [Rule::Linear, Rule::Cat, Rule::Svd] {
        let sum = combine(&one, &options(rule)).unwrap();
        assert!(sum.error.unwrap() < 1e-6, "{rule:?}");
        let expected = change(&one[0].config, &one[0].tensors).scale(-0.25).unwrap();
        close(&change(&sum.config, &sum.tensors), &expected, 1e-6);
    }
    let two = [term(json!({ "rank": 2 }), 1.0), term(json!({ "rank": 3 }), 1.0)];
    let error = combine(&two, &options(Rule::Linear)).err().unwrap().to_string();
    assert!(error.contains("ranks 2 and 3") && error.contains("cat"), "{error}");
}

#[test]
fn a_weight_of_zero_leaves_an_adapter_out() {
    let terms = [term(json!({ "rank": 2 }), 0.0), term(json!({ "rank": 2, "alpha": 3.0 }), 0.5)];
    let expected = change(&terms[1].config, &terms[1].tensors).scale(0.5).unwrap();
    for rule in [Rule::Cat, Rule::Svd, Rule::Linear] {
        let sum = combine(&terms, &options(rule)).unwrap();
        close(&change(&sum.config, &sum.tensors), &expected, 1e-6);
    }
    // What is trained as a whole has no mean of nothing.
    let error =
        combine(&[term(json!({ "rank": 2, "bias": "all" }), 0.0)], &options(Rule::Cat)).err().unwrap();
    assert!(error.to_string().contains("sum of zero"), "{error}");
}

#[test]
fn pruning_keeps_its_share_and_dare_its_mean() {
    let stack = |recipe, density, seed| {
        let tensors = vec![sample(&[40, 50], 1)];
        let stack = Stack { tensors, weights: vec![1.0], numbers: vec![0], name: "x".into() };
        stack.combine(recipe, &Options { density, seed, ..options(Rule::Cat) }).unwrap().to_vec().unwrap()
    };
    let x = sample(&[40, 50], 1).to_vec().unwrap();
    let kept = stack(Recipe { keep_largest: true, ..Recipe::default() }, 0.1, 0);
    assert_eq!(kept.iter().filter(|v| **v != 0.0).count(), 200);
    let least = kept.iter().filter(|v| **v != 0.0).fold(f32::MAX, |m, v| m.min(v.abs()));
    assert!(x.iter().zip(&kept).all(|(x, k)| *k == *x || x.abs() <= least));
    let drawn: Vec<Vec<f32>> =
        (0..200).map(|seed| stack(Recipe { keep_random: true, ..Recipe::default() }, 0.3, seed)).collect();
    let mean = |at: usize| drawn.iter().map(|d| d[at]).sum::<f32>() / drawn.len() as f32;
    let off = (0..x.len()).map(|at| (mean(at) - x[at]).abs()).sum::<f32>() / x.len() as f32;
    // The standard error of a mean of 200 draws is |x|·√(0.7/0.3/200) = 0.11·|x|.
    let size = x.iter().map(|v| v.abs()).sum::<f32>() / x.len() as f32;
    assert!(off < 0.12 * size, "{off} {size}");
    assert!(drawn[0] != drawn[1]);
}

#[test]
fn only_the_elected_sign_counts() {
    let row = |values: [f32; 4]| Tensor::from_vec(values.to_vec(), [1, 4]).unwrap();
    let stack = |sign| {
        let tensors =
            vec![row([1.0, -3.0, 0.0, 1.0]), row([2.0, 1.0, 0.0, -1.0]), row([-4.0, 1.0, 5.0, 0.0])];
        let stack = Stack { tensors, weights: vec![1.0; 3], numbers: vec![0, 1, 2], name: "x".into() };
        let recipe = Recipe { elect: true, ..Recipe::default() };
        stack.combine(recipe, &Options { sign, ..options(Rule::Ties) }).unwrap().to_vec().unwrap()
    };
    assert_eq!(stack(Sign::Total), [-4.0, -3.0, 5.0, 1.0]);
    assert_eq!(stack(Sign::Frequency), [1.5, 1.0, 5.0, 1.0]);
}

#[test]
fn equal_adapters_average_to_themselves_and_others_are_refused() {
    let a = || term(json!({ "rank": 2 }), 2.0);
    let soup = combine(&[a(), a(), a()], &options(Rule::Average)).unwrap();
    for ((name, found), (_, expected)) in soup.tensors.iter().zip(&a().tensors) {
        close(found, expected, 1e-6);
        assert!(a().tensors.iter().any(|(n, _)| n == name));
    }
    assert!(soup.error.unwrap() < 1e-6);
    let other = term(json!({ "rank": 2, "alpha": 7.0 }), 1.0);
    let error = combine(&[a(), other], &options(Rule::Average)).err().unwrap().to_string();
    assert!(error.contains("lora_alpha"), "{error}");
    let dora = term(json!({ "rank": 2, "dora": true }), 1.0);
    assert!(combine(&[dora], &options(Rule::Cat)).err().unwrap().to_string().contains("DoRA"));
    let wrong = combine(&[a()], &Options { density: 0.0, ..options(Rule::Ties) });
    assert!(wrong.err().unwrap().to_string().contains("density"));
}

/// A bottleneck of the toy model with random contents, its units moved by `order` where one is given.
fn bottleneck(stirred: f32, order: Option<&[i64]>) -> Term {
    let methods = [chosen("bottleneck", json!({ "reduction": 2 }))];
    let a = attached(&methods, &[]);
    stir(&a, stirred);
    let (sites, info) = crate::testing::toy();
    let (config, mut tensors) =
        crate::save_adapter(&a.adapter, &methods, &[], "base", &sites, &info).unwrap();
    if let Some(order) = order {
        let places = Tensor::from_i64(order.to_vec(), [order.len()]).unwrap();
        for (name, tensor) in &mut tensors {
            *tensor = match &name[name.find("adapter_").unwrap()..] {
                "adapter_down.0.weight" => tensor.gather(&places).unwrap(),
                "adapter_down.0.bias" => {
                    let rows = tensor.reshape([order.len(), 1]).unwrap().gather(&places).unwrap();
                    rows.reshape([order.len()]).unwrap()
                }
                "adapter_up.weight" => tensor.t().unwrap().gather(&places).unwrap().t().unwrap(),
                _ => continue,
            };
        }
    }
    Term { name: format!("stirred {stirred}"), config, tensors, weight: 1.0 }
}

#[test]
fn mera_does_not_care_for_the_order_of_units() {
    let options = Options::of(Rule::Mera);
    let merged = |order: Option<&[i64]>| {
        combine(&[bottleneck(0.5, None), bottleneck(0.3, order)], &options).unwrap().tensors
    };
    let expected = merged(None);
    for order in [[2, 0, 1], [1, 0, 2]] {
        for ((name, found), (_, expected)) in merged(Some(&order)).iter().zip(&expected) {
            assert!(found.to_bytes().unwrap() == expected.to_bytes().unwrap(), "{name}");
        }
    }
    // One that differs by the order alone is the first itself.
    let same = combine(&[bottleneck(0.5, None), bottleneck(0.5, Some(&[2, 0, 1]))], &options).unwrap();
    for ((name, found), (_, expected)) in same.tensors.iter().zip(&bottleneck(0.5, None).tensors) {
        assert!(found.to_vec().unwrap() == expected.to_vec().unwrap(), "{name}");
    }
    assert!(same.notes[0].contains("the distance of W_d is 0%"), "{}", same.notes[0]);
}

#[test]
fn lorahub_with_one_weight_is_that_adapter_and_with_none_the_base() {
    let terms = |a: f64, b: f64| {
        let (x, y) =
            (term(json!({ "rank": 2, "alpha": 3.0 }), a), term(json!({ "rank": 2, "rslora": true }), b));
        [x, y]
    };
    let of = |a: f64, b: f64| {
        let composed = combine(&terms(a, b), &Options::of(Rule::LoraHub)).unwrap();
        change(&composed.config, &composed.tensors)
    };
    let [x, y] = terms(1.0, 1.0);
    close(&of(1.0, 0.0), &change(&x.config, &x.tensors), 1e-6);
    close(&of(0.0, 1.0), &change(&y.config, &y.tensors), 1e-6);
    close(&of(0.0, 0.0), &Tensor::zeros([6, 6]), 0.0);
    // A weight of −1 is the adapter itself: it turns both factors.
    close(&of(-1.0, 0.0), &of(1.0, 0.0), 1e-6);
    let ranks = [term(json!({ "rank": 2 }), 1.0), term(json!({ "rank": 3 }), 1.0)];
    let error = combine(&ranks, &Options::of(Rule::LoraHub)).err().unwrap().to_string();
    assert!(error.contains("ranks 2 and 3"), "{error}");
}

#[test]
fn lorahub_keeps_a_head_that_is_the_same_in_all() {
    let head = |value: f32| {
        let methods = [chosen("lora", json!({ "rank": 2 }))];
        let a = attached(&methods, &["head"]);
        stir(&a, 0.3);
        let (sites, info) = crate::testing::toy();
        let also = ["head".to_owned()];
        let (config, mut tensors) =
            crate::save_adapter(&a.adapter, &methods, &also, "base", &sites, &info).unwrap();
        let own = tensors.iter_mut().find(|(name, _)| name.contains("head.weight")).unwrap();
        own.1 = own.1.scale(value).unwrap();
        Term { name: format!("head {value}"), config, tensors, weight: 0.0 }
    };
    let hub = Options::of(Rule::LoraHub);
    let kept = combine(&[head(1.0), head(1.0)], &hub).unwrap();
    let of =
        |tensors: &Named| tensors.iter().find(|(name, _)| name.contains("head.weight")).unwrap().1.clone();
    close(&of(&kept.tensors), &of(&head(1.0).tensors), 0.0);
    assert!(kept.notes[0].contains("the same in all and kept"), "{:?}", kept.notes);
    for others in [[head(1.0), head(2.0)], [head(1.0), term(json!({ "rank": 2 }), 1.0)]] {
        let error = combine(&others, &hub).err().unwrap().to_string();
        assert!(error.contains("not the same in all"), "{error}");
    }
}

#[test]
fn lorahub_finds_weights_that_lower_the_loss() {
    let mut terms = [term(json!({ "rank": 2 }), 1.0), term(json!({ "rank": 2, "alpha": 5.0 }), 1.0)];
    let aim = change(&terms[0].config, &terms[0].tensors).scale(0.25).unwrap();
    let how = Search { penalty: 1e-4, evaluations: 400, ..Search::default() };
    let found =
        search(&mut terms, &how, &mut |config, tensors| norm(&change(config, tensors).sub(&aim)?)).unwrap();
    assert!(found.value < 0.01 * found.start, "{found:?}");
    // Both hold the same factors, with scales of 8 and 2.5: together they must be half of the first, whose square is a quarter.
    let together = found.weights[0] * 8f64.sqrt() + found.weights[1] * 2.5f64.sqrt();
    assert!((together.abs() - 0.5 * 8f64.sqrt()).abs() < 0.01, "{found:?}");
    assert_eq!(terms[0].weight, found.weights[0]);
}

/// What only training needs goes; what acts on some tokens alone is no term of a sum.
#[test]
fn forms_of_training_add_as_plain_products() {
    let terms = [
        term(json!({ "rank": 2, "velora": true, "velora_init_type": "random" }), 0.5),
        term(json!({ "rank": 3, "monteclora": true }), 0.5),
    ];
    let exact = terms.iter().fold(Tensor::zeros([6, 6]), |sum, t| {
        sum.add(&change(&t.config, &t.tensors).scale(0.5).unwrap()).unwrap()
    });
    let sum = combine(&terms, &options(Rule::Cat)).unwrap();
    close(&change(&sum.config, &sum.tensors), &exact, 1e-6);
    assert!(sum.tensors.iter().all(|(name, _)| name.contains("lora_A") || name.contains("lora_B")));
    let activated = [term(json!({ "rank": 2, "alora_invocation_tokens": [3] }), 0.5)];
    let error = combine(&activated, &options(Rule::Cat)).err().unwrap();
    assert!(error.to_string().contains("aLoRA"), "{error}");
}

/// A file of `peft` whose start was taken off the base, with the change that it stands for.
fn unconverted(start: &str, settings: Value, weight: f64) -> (Term, Tensor) {
    let mut file = term(settings, weight);
    file.config["init_lora_weights"] = json!(start);
    let change = change(&file.config, &file.tensors);
    (file, change)
}

#[test]
fn a_product_on_a_base_without_its_start_is_made_plain_before_it_is_added() {
    let plain = || term(json!({ "rank": 2 }), 1.0);
    let (sites, info) = crate::testing::toy();
    for (start, settings) in [
        ("pissa", json!({ "rank": 2 })),
        ("olora", json!({ "rank": 3, "rslora": true, "rank_pattern": { "v": 1 } })),
    ] {
        let (file, expected) = unconverted(start, settings, 0.6);
        for rule in
            Rule::ALL.iter().map(|(_, rule)| *rule).filter(|r| !matches!(r, Rule::Average | Rule::Mera))
        {
            let error = combine(&[plain(), file.clone()], &options(rule)).err().unwrap().to_string();
            let says = "`engraft convert weight 0.6 --model base --out DIR`";
            assert!(error.contains(start) && error.contains(says), "{error}");
        }
        // Alike they average: what was taken off is the same.
        let soup = combine(&[file.clone(), file.clone()], &options(Rule::Average)).unwrap();
        assert_eq!((&soup.config["init_lora_weights"], soup.error), (&json!(start), None));
        close(&change(&soup.config, &soup.tensors), &expected, 1e-5);
        let converted = Term { config: file.config.clone(), ..file.clone() };
        let mut other = converted.clone();
        other.config["init_lora_weights"] = json!(true);
        let error = combine(&[converted, other], &options(Rule::Average)).err().unwrap().to_string();
        assert!(error.contains("init_lora_weights"), "{error}");
        // As it is converted it adds.
        let loaded = crate::load_adapter(&file.config, file.tensors.clone(), &sites, &info).unwrap();
        let methods = [crate::joined_start(&file.config).unwrap().unwrap()];
        let (config, tensors) =
            crate::save_adapter(&loaded.adapter, &methods, &[], "base", &sites, &info).unwrap();
        let joined = Term { config, tensors, ..file.clone() };
        close(&change(&joined.config, &joined.tensors), &expected, 1e-5);
        let sum = combine(&[plain(), joined], &options(Rule::Cat)).unwrap();
        let plain = plain();
        let both = change(&plain.config, &plain.tensors).add(&expected.scale(0.6).unwrap()).unwrap();
        close(&change(&sum.config, &sum.tensors), &both, 1e-5);
    }
    assert!(crate::joined_start(&plain().config).unwrap().is_none());
}

/// What a combined file does, on the toy model.
fn loaded(sum: &Combined) -> engraft_nn::Adapter {
    let (sites, info) = crate::testing::toy();
    crate::load_adapter(&sum.config, sum.tensors.clone(), &sites, &info).unwrap().adapter
}

fn vector(adapter: &engraft_nn::Adapter, path: &str) -> Tensor {
    let (sites, _) = crate::testing::toy();
    let merged = engraft_nn::merged_tensors(&sites, adapter).unwrap();
    merged.iter().find(|m| m.site.path == path).unwrap().value.clone()
}

#[test]
fn what_one_of_the_files_has_beside_its_products_comes_along() {
    let plain = || term(json!({ "rank": 2 }), 0.5);
    // A product's bias is zero where an adapter has none.
    let with_bias = |targets: &[&str], weight| {
        let methods = [(
            chosen("lora", json!({ "rank": 2, "lora_bias": true })).0,
            Some(Targets::names(targets.to_vec())),
        )];
        let a = attached(&methods, &[]);
        stir(&a, 0.3);
        let (sites, info) = crate::testing::toy();
        let (config, tensors) =
            crate::save_adapter(&a.adapter, &methods, &[], "base", &sites, &info).unwrap();
        (Term { name: "with biases".into(), config, tensors, weight }, a)
    };
    let (other, a) = with_bias(&["attn.q", "mlp.down"], 0.4);
    let expected = vector(&a.adapter, "layers.1.attn.q.bias").sub(&frozen("layers.1.attn.q.bias")).unwrap();
    for terms in [[plain(), other.clone()], [other, plain()]] {
        let sum = combine(&terms, &options(Rule::Cat)).unwrap();
        assert_eq!(sum.config["lora_bias"], json!(true));
        let zero = sum.tensors.iter().find(|(name, _)| name.ends_with("0.attn.v.lora_B.bias")).unwrap();
        close(&zero.1, &Tensor::zeros([4]), 0.0);
        let (sites, info) = crate::testing::toy();
        assert!(crate::load_adapter(&sum.config, sum.tensors.clone(), &sites, &info).is_ok());
        let bias = sum.tensors.iter().find(|(name, _)| name.ends_with("1.attn.q.lora_B.bias")).unwrap();
        close(&bias.1, &expected.scale(0.4).unwrap(), 1e-6);
    }
    // The model's biases are those of the adapter that trains them all.
    let all = term(json!({ "rank": 2, "bias": "all" }), 1.0);
    let trained = all.tensors.iter().find(|(name, _)| name.ends_with("1.attn.k.bias")).unwrap().1.clone();
    for terms in [[plain(), all.clone()], [all.clone(), plain()]] {
        let sum = combine(&terms, &options(Rule::Cat)).unwrap();
        assert_eq!(sum.config["bias"], json!("all"));
        close(&vector(&loaded(&sum), "layers.1.attn.k.bias"), &trained, 1e-6);
    }
    // Where the targets differ, one names a bias as of a target and another as it is.
    let methods = [(chosen("lora", json!({ "rank": 2, "bias": "all" })).0, Some(Targets::names(["attn.k"])))];
    let a = attached(&methods, &[]);
    let (sites, info) = crate::testing::toy();
    let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "base", &sites, &info).unwrap();
    let keys = Term { name: "keys".into(), config, tensors, weight: 1.0 };
    let sum = combine(&[all.clone(), keys], &options(Rule::Cat)).unwrap();
    let mean = trained.add(&frozen("layers.1.attn.k.bias")).unwrap().scale(0.5).unwrap();
    close(&vector(&loaded(&sum), "layers.1.attn.k.bias"), &mean, 1e-6);
    let refused = |a: Term, b: Term| combine(&[a, b], &options(Rule::Cat)).err().unwrap().to_string();
    let some = term(json!({ "rank": 2, "bias": "lora_only" }), 1.0);
    assert!(refused(plain(), some).contains("`bias` is \"none\" in weight 0.5 and \"lora_only\""));
    let mut ties = plain();
    ties.config["ensure_weight_tying"] = json!(true);
    assert!(refused(plain(), ties).contains("`ensure_weight_tying` differs"));
    let mut whole = plain();
    whole.config["modules_to_save"] = json!(["layers.0.attn.q"]);
    whole.tensors.retain(|(name, _)| !name.contains("layers.0.attn.q."));
    whole.tensors.push(("base_model.model.layers.0.attn.q.weight".into(), frozen("layers.0.attn.q")));
    assert!(refused(plain(), whole).contains("layers.0.attn.q: it is trained as a whole"));
}

#[test]
fn rows_of_tokens_meet_by_their_tokens() {
    const NAME: &str = "base_model.model.tok.token_adapter.trainable_tokens_delta";
    let with = |tokens: Value, seed, weight| {
        let mut found = term(json!({ "rank": 2 }), weight);
        let ids = tokens.as_array().cloned().unwrap_or_else(|| tokens["tok"].as_array().unwrap().clone());
        let rows = sample(&[ids.len(), 6], seed);
        found.config["trainable_token_indices"] = tokens;
        found.tensors.push((NAME.into(), rows.clone()));
        (found, rows)
    };
    let row = |rows: &Tensor, at: usize| rows.rows_between(at, at + 1).unwrap();
    for in_table in [false, true] {
        let of = |ids: Value| if in_table { json!({ "tok": ids }) } else { ids };
        let (a, rows_a) = with(of(json!([7, 3])), 1, 0.25);
        let (b, rows_b) = with(of(json!([2, 7])), 2, 0.75);
        let sum = combine(&[a.clone(), b], &options(Rule::Cat)).unwrap();
        assert_eq!(sum.config["trainable_token_indices"], of(json!([7, 3, 2])));
        let both = row(&rows_a, 0).scale(0.25).unwrap().add(&row(&rows_b, 1).scale(0.75).unwrap()).unwrap();
        let table = vector(&loaded(&sum), "tok");
        for (token, expected) in [(7, &both), (3, &row(&rows_a, 1)), (2, &row(&rows_b, 0))] {
            close(&row(&table, token), expected, 1e-6);
        }
        // Beside an adapter without any they stay as they are.
        let sum = combine(&[term(json!({ "rank": 2 }), 1.0), a.clone()], &options(Rule::Cat)).unwrap();
        assert_eq!(sum.config["trainable_token_indices"], of(json!([7, 3])));
        close(&row(&vector(&loaded(&sum), "tok"), 3), &row(&rows_a, 1), 1e-6);
        let (other, _) = with(if in_table { json!([1]) } else { json!({ "tok": [1] }) }, 3, 1.0);
        let error = combine(&[a, other], &options(Rule::Cat)).err().unwrap().to_string();
        assert!(error.contains("names tables otherwise"), "{error}");
    }
}

#[test]
fn scales_add_by_weight_at_the_modules_of_each() {
    let of = |targets: &[&str], weight: f64| {
        let feedforward: Vec<&str> = targets.iter().copied().filter(|name| *name == "mlp.down").collect();
        let settings = json!({ "feedforward": feedforward });
        let methods = [(chosen("ia3", settings).0, Some(Targets::names(targets.iter().copied())))];
        let a = attached(&methods, &[]);
        stir(&a, 0.3);
        let (sites, info) = crate::testing::toy();
        let (config, tensors) = crate::save_adapter(&a.adapter, &methods, &[], "b", &sites, &info).unwrap();
        Term { name: format!("weight {weight}"), config, tensors, weight }
    };
    let (one, other) = (of(&["attn.q", "mlp.down"], 0.7), of(&["attn.q", "attn.v"], -0.4));
    let sum = combine(&[one.clone(), other.clone()], &options(Rule::Linear)).unwrap();
    assert_eq!(sum.config["target_modules"], json!(["attn.q", "attn.v", "mlp.down"]));
    assert_eq!(sum.config["feedforward_modules"], json!(["mlp.down"]));
    let find = |tensors: &Named, end: &str| {
        tensors.iter().find(|(name, _)| name.contains(end)).map(|(_, value)| value.clone())
    };
    let scaled =
        |term: &Term, end: &str| find(&term.tensors, end).unwrap().scale(term.weight as f32).unwrap();
    let both = scaled(&one, "layers.0.attn.q").add(&scaled(&other, "layers.0.attn.q")).unwrap();
    close(&find(&sum.tensors, "layers.0.attn.q").unwrap(), &both, 1e-6);
    close(&find(&sum.tensors, "layers.1.attn.v").unwrap(), &scaled(&other, "layers.1.attn.v"), 1e-6);
    assert!(find(&one.tensors, "attn.v").is_none());
    let error = combine(&[one, other], &options(Rule::Cat)).err().unwrap().to_string();
    assert!(error.contains("(IA)³ by the rule linear"), "{error}");
}

#[test]
fn what_is_equal_in_all_is_kept_whatever_the_weights() {
    let (mut one, mut other) = (term(json!({ "rank": 1 }), 1.0), term(json!({ "rank": 1 }), -2.0));
    let copy = ("base_model.model.tok.base_layer.weight".to_owned(), frozen("tok"));
    one.tensors.push(copy.clone());
    other.tensors.push(copy.clone());
    let sum = combine(&[one.clone(), other.clone()], &options(Rule::Cat)).unwrap();
    let kept = sum.tensors.iter().find(|(name, _)| *name == copy.0).unwrap();
    close(&kept.1, &copy.1, 0.0);
    let last = other.tensors.len() - 1;
    other.tensors[last].1 = copy.1.scale(2.0).unwrap();
    let error = combine(&[one, other], &options(Rule::Cat)).err().unwrap().to_string();
    assert!(error.contains("can only be averaged"), "{error}");
}
