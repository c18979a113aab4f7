//! The methods that are compared, each at about one and a fifth of a percent of the model's weights where its settings reach it.

/// What a comparison holds equal.
pub const BUDGETS: &[&str] = &["1 %", "0.2 %"];

/// The classifier alone.
pub const LINEAR_PROBE: &str = "linear probe";

/// A method of the comparison.
pub struct Entry {
    pub name: &'static str,
    pub class: &'static str,
    /// The middle one of the three learning rates that are tried first at the first budget it has; the others are a third and
    /// three times of it.
    pub learning_rate: f64,
    /// Settings below `[method]` for each of [`BUDGETS`]; `None` where the method has no such size.
    pub settings: [Option<&'static str>; 2],
}

const fn both(
    name: &'static str,
    class: &'static str,
    learning_rate: f64,
    one: &'static str,
    fifth: &'static str,
) -> Entry {
    Entry { name, class, learning_rate, settings: [Some(one), Some(fifth)] }
}

const fn small(name: &'static str, class: &'static str, learning_rate: f64, fifth: &'static str) -> Entry {
    Entry { name, class, learning_rate, settings: [None, Some(fifth)] }
}

/// Trained whole or not at all, whatever the budget: they stand in the first table.
pub const BOUNDS: &[Entry] = &[
    Entry {
        name: "full fine-tuning",
        class: "",
        learning_rate: 3e-4,
        settings: [Some("name = \"full\""), None],
    },
    Entry { name: LINEAR_PROBE, class: "", learning_rate: 1e-1, settings: [Some("name = \"head\""), None] },
];

/// The methods, class by class.
pub const METHODS: &[Entry] = &[
    both(
        "adapter, Houlsby",
        "additive",
        3e-3,
        "name = \"bottleneck\"\nform = \"houlsby\"\nreduction = 16",
        "name = \"bottleneck\"\nform = \"houlsby\"\nreduction = 96",
    ),
    both(
        "adapter, Pfeiffer",
        "additive",
        9e-3,
        "name = \"bottleneck\"\nreduction = 8",
        "name = \"bottleneck\"\nreduction = 48",
    ),
    both(
        "Compacter",
        "additive",
        9e-3,
        "name = \"compacter\"\nreduction = 8\nrank = 20",
        "name = \"compacter\"\nreduction = 8\nrank = 4",
    ),
    small("SSF", "additive", 9e-3, "name = \"ssf\"\ninit = \"identity\""),
    small("(IA)³", "additive", 3e-2, "name = \"ia3\""),
    both("prefix tuning", "prompt", 3e-2, "name = \"prefix\"\ntokens = 50", "name = \"prefix\"\ntokens = 10"),
    small("prompt tuning", "prompt", 9e-2, "name = \"prompt\"\ntokens = 20"),
    small("BitFit", "selective", 9e-3, "name = \"bitfit\""),
    small("norm tuning", "selective", 9e-3, "name = \"ln_tuning\""),
    both(
        "FISH mask",
        "selective",
        3e-3,
        "name = \"fish\"\ndensity = 0.02\nsamples = 256\ntargets = \"all-linear\"",
        "name = \"fish\"\ndensity = 0.004\nsamples = 256\ntargets = \"all-linear\"",
    ),
    both(
        "random mask",
        "selective",
        9e-3,
        "name = \"random_mask\"\ndensity = 0.02\ntargets = \"all-linear\"",
        "name = \"random_mask\"\ndensity = 0.004\ntargets = \"all-linear\"",
    ),
    both(
        "LoRA",
        "reparameterized",
        3e-3,
        "name = \"lora\"\nrank = 5\nalpha = 10\ntargets = \"all-linear\"",
        "name = \"lora\"\nrank = 1\nalpha = 2\ntargets = \"all-linear\"",
    ),
    both(
        "DoRA",
        "reparameterized",
        3e-3,
        "name = \"lora\"\ndora = true\nrank = 5\nalpha = 10\ntargets = \"all-linear\"",
        "name = \"lora\"\ndora = true\nrank = 4\nalpha = 8",
    ),
    both(
        "LoHa",
        "reparameterized",
        9e-3,
        "name = \"loha\"\nrank = 3\nalpha = 6\ntargets = \"all-linear\"",
        "name = \"loha\"\nrank = 2\nalpha = 4",
    ),
    both(
        "MiSS",
        "reparameterized",
        1e-3,
        "name = \"miss\"\nrank = 10\ntargets = \"all-linear\"",
        "name = \"miss\"\nrank = 2\ntargets = \"all-linear\"",
    ),
    both(
        "OFT",
        "reparameterized",
        3e-3,
        "name = \"oft\"\nblock_size = 24\ntargets = \"all-linear\"",
        "name = \"oft\"\nblock_size = 6\ntargets = \"all-linear\"",
    ),
    both(
        "FourierFT",
        "reparameterized",
        1e-2,
        "name = \"fourierft\"\nn_frequency = 6000\ninit = \"zeros\"\ntargets = \"all-linear\"",
        "name = \"fourierft\"\nn_frequency = 1250\ninit = \"zeros\"\ntargets = \"all-linear\"",
    ),
    both(
        "MAM",
        "hybrid",
        3e-3,
        "name = \"mam\"\ntokens = 25\nprojection = 0\nreduction = 16",
        "name = \"mam\"\ntokens = 5\nprojection = 0\nreduction = 96",
    ),
    both(
        "UniPELT",
        "hybrid",
        9e-3,
        "name = \"unipelt\"\ntokens = 15\nprojection = 0\nreduction = 32\nrank = 8",
        "name = \"unipelt\"\ntokens = 2\nprojection = 0\nreduction = 128\nrank = 1",
    ),
    both("S4", "hybrid", 9e-3, "name = \"s4\"\nbudget = 0.01", "name = \"s4\"\nbudget = 0.002"),
];
