//! What kernels demand of a processor against what is looked for before they
//! run: the table of features in `isa.rs`. It deliberately does not follow
//! calls. A function is compiled for one of the table's sets as a whole, so
//! that the match on the set that guards it can be read beside it.

use crate::lexer::{code_only, has_word};
use crate::{Finding, Tree};

/// Where the table stands.
const TABLE: &str = "crates/hypergen-cpu/src/isa.rs";
/// Features that every x86-64 processor has, or that the one function which
/// has them in its list asks for itself.
const ALWAYS: [&str; 2] = ["sse2", "xsave"];

/// The feature that each intrinsic needs, by Intel's guide to intrinsics; of
/// several, the one that fewest processors have.
const INTRINSICS: [(&str, &str); 7] = [
    (
        "sse2",
        "_mm_add_ps _mm_add_ss _mm_cvtss_f32 _mm_loadu_si128 _mm_max_ps _mm_max_ss _mm_movehl_ps _mm_prefetch \
         _mm_sfence _mm_shuffle_ps _mm_storeu_si128 _mm_stream_si128",
    ),
    (
        "avx2",
        "_mm256_add_epi32 _mm256_add_ps _mm256_and_si256 _mm256_andnot_ps _mm256_blendv_epi8 _mm256_blendv_ps \
         _mm256_castps256_ps128 _mm256_castps_si256 _mm256_castsi256_ps _mm256_castsi256_si128 _mm256_cmp_ps \
         _mm256_cvtepu16_epi32 _mm256_cvtps_epi32 _mm256_div_ps _mm256_extractf128_ps \
         _mm256_extracti128_si256 _mm256_loadu_ps _mm256_loadu_si256 _mm256_max_ps _mm256_min_ps \
         _mm256_mul_ps _mm256_or_si256 _mm256_rcp_ps _mm256_round_ps _mm256_set1_epi32 _mm256_set1_ps \
         _mm256_setr_epi16 _mm256_slli_epi32 _mm256_srai_epi32 _mm256_srli_epi32 _mm256_storeu_ps \
         _mm256_storeu_si256 _mm256_sub_epi32 _mm256_sub_ps _mm_packus_epi32",
    ),
    ("fma", "_mm256_fmadd_ps _mm256_fnmadd_ps"),
    (
        "avx512f",
        "_mm512_abs_ps _mm512_add_epi32 _mm512_add_ps _mm512_and_si512 _mm512_castps_si512 \
         _mm512_castsi512_ps _mm512_cmp_ps_mask _mm512_cvtepi32_epi16 _mm512_cvtepu16_epi32 \
         _mm512_cvtps_epi32 _mm512_div_ps _mm512_fmadd_ps _mm512_fnmadd_ps _mm512_loadu_ps \
         _mm512_loadu_si512 _mm512_mask_blend_ps _mm512_mask_max_ps _mm512_mask_mov_epi32 \
         _mm512_mask_or_epi32 _mm512_mask_storeu_ps _mm512_maskz_loadu_ps _mm512_max_ps _mm512_min_ps \
         _mm512_mul_ps _mm512_or_si512 _mm512_rcp14_ps _mm512_reduce_add_ps _mm512_reduce_max_ps \
         _mm512_roundscale_ps _mm512_scalef_ps _mm512_set1_epi16 _mm512_set1_epi32 _mm512_set1_ps \
         _mm512_setzero_ps _mm512_setzero_si512 _mm512_shuffle_i32x4 _mm512_slli_epi32 _mm512_srli_epi32 \
         _mm512_storeu_ps _mm512_storeu_si512 _mm512_stream_si512 _mm512_sub_ps _mm512_ternarylogic_epi32 \
         _mm512_unpackhi_epi32 _mm512_unpackhi_epi64 _mm512_unpacklo_epi32 _mm512_unpacklo_epi64 \
         _mm512_xor_si512",
    ),
    (
        "avx512bw",
        "_mm256_mask_storeu_epi16 _mm256_maskz_loadu_epi16 _mm512_add_epi16 _mm512_cmpgt_epu16_mask \
         _mm512_mask_blend_epi16 _mm512_maskz_loadu_epi16 _mm512_maskz_mov_epi16 _mm512_max_epu16 \
         _mm512_packus_epi32 _mm512_permutexvar_epi16 _mm512_srli_epi16",
    ),
    ("avx512bf16", "_mm512_cvtne2ps_pbh _mm512_cvtneps_pbh _mm512_dpbf16_ps"),
    ("avx512vbmi", "_mm512_permutex2var_epi8"),
];

/// The same for the instructions that `asm!` names.
const INSTRUCTIONS: [(&str, &str); 6] = [
    ("amx-bf16", "tdpbf16ps"),
    ("amx-tile", "ldtilecfg tileloadd tileloaddt1 tilerelease tilestored tilezero"),
    ("avx2", "vxorps"),
    ("avx512bf16", "vdpbf16ps"),
    ("avx512f", "vpxord"),
    ("fma", "vfmadd231ps"),
];

/// Every rule of this file.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    let sets = tree.text(TABLE).map(sets).unwrap_or_default();
    for (file, text) in tree.texts(&["rs"]) {
        // This crate names features and instructions without using any.
        if file.path.starts_with("crates/tidy/") {
            continue;
        }
        let code = code_only(text);
        let lists = enabled(text, &code);
        for (index, list) in &lists {
            findings.extend(whole_set(&file.path, *index, list, &sets));
        }
        let enabled: Vec<&str> = lists.iter().flat_map(|(_, list)| list.iter().copied()).collect();
        findings.extend(intrinsics(&file.path, &code, &enabled));
        findings.extend(instructions(&file.path, text, &code, &sets));
    }
    findings
}

/// The features of each set of the table, those of the sets before it included.
fn sets(text: &str) -> Vec<Vec<&str>> {
    let table = text.split_once("const FEATURES").and_then(|(_, rest)| rest.split_once("];"));
    let mut all = Vec::new();
    let mut sets = Vec::new();
    for line in table.map_or("", |(table, _)| table).lines().filter(|line| line.contains("(Isa::")) {
        all.extend(line.split('"').skip(1).step_by(2));
        sets.push(all.clone());
    }
    sets
}

/// What each `target_feature` of a file enables, by line.
fn enabled<'a>(text: &'a str, code: &str) -> Vec<(usize, Vec<&'a str>)> {
    let lines = text.lines().zip(code.lines()).enumerate();
    lines
        .filter(|(_, (_, code))| has_word(code, "target_feature"))
        .filter_map(|(index, (text, _))| {
            Some((index, text.split('"').nth(1)?.split(',').map(str::trim).collect()))
        })
        .collect()
}

/// A function is compiled for a whole set: then whoever matches on the set has
/// looked for all that it needs.
fn whole_set(path: &str, index: usize, list: &[&str], sets: &[Vec<&str>]) -> Option<Finding> {
    // The compiler does not know the features of tiles, which only `asm!` names.
    let compiled = |set: &[&str]| set.iter().filter(|f| !f.starts_with("amx")).count();
    let is_set = |set: &Vec<&str>| list.iter().all(|f| set.contains(f)) && compiled(set) == list.len();
    let asks_itself = path == TABLE && list.iter().all(|f| ALWAYS.contains(f));
    let message = || {
        let named = list.join(",");
        format!(
            "compiled for \"{named}\", which is no set of the table of features in {TABLE}: enable the features of a set, all of them and no others"
        )
    };
    (!asks_itself && !sets.iter().any(is_set)).then(|| Finding::line(path, index, message()))
}

/// Each intrinsic is known, and a function of its file enables what it needs.
fn intrinsics(path: &str, code: &str, enabled: &[&str]) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (index, line) in code.lines().enumerate() {
        let words = line.split(|c: char| !c.is_alphanumeric() && c != '_');
        for name in words.filter(|word| is_intrinsic(word)) {
            let known = INTRINSICS.iter().find(|(_, names)| names.split(' ').any(|known| known == name));
            let message = match known {
                None => format!(
                    "`{name}`: say which feature it needs in INTRINSICS of crates/tidy/src/features.rs"
                ),
                Some((feature, _)) if ALWAYS.contains(feature) || enabled.contains(feature) => continue,
                Some((feature, _)) => {
                    format!("`{name}` needs {feature}, which no function of this file enables")
                }
            };
            findings.push(Finding::line(path, index, message));
        }
    }
    findings
}

/// `_mm_...`, `_mm256_...`, `_mm512_...`
fn is_intrinsic(word: &str) -> bool {
    ["_mm_", "_mm256_", "_mm512_"].iter().any(|prefix| word.starts_with(prefix))
}

/// Each instruction that is written out belongs to a feature of the table.
fn instructions(path: &str, text: &str, code: &str, sets: &[Vec<&str>]) -> Vec<Finding> {
    if !["asm", "tile_code"].iter().any(|name| has_word(code, name)) {
        return Vec::new();
    }
    let looked_for = sets.last().map_or(&[][..], |all| all);
    let mut findings = Vec::new();
    for (feature, names) in INSTRUCTIONS {
        let missing = !looked_for.contains(&feature);
        let used = |line: &str| names.split(' ').any(|name| line.contains(&format!("\"{name} ")));
        let first = text.lines().position(used).filter(|_| missing);
        findings.extend(first.map(|index| {
            Finding::line(
                path,
                index,
                format!("an instruction of {feature}, which {TABLE} does not look for"),
            )
        }));
    }
    findings
}

#[cfg(test)]
mod tests {
    //! Kernels that would be an illegal instruction somewhere.
    use super::*;

    const ISA: &str = "//! Sets.\nconst FEATURES: [(Isa, &[&str]); 3] = [\n    (Isa::Portable, &[]),\n    \
        (Isa::Avx2, &[\"avx2\", \"fma\"]),\n    (Isa::AmxBf16, &[\"avx512f\", \"amx-tile\"]),\n];\n";

    fn findings(kernel: &str) -> Vec<String> {
        let tree =
            Tree::sample(&[(TABLE, ISA), ("crates/hypergen-cpu/src/a.rs", &format!("//! A.\n{kernel}\n"))]);
        check(&tree).into_iter().map(|finding| finding.message).collect()
    }

    #[test]
    fn whole_sets_are_fine() {
        for kernel in [
            "#[target_feature(enable = \"avx2,fma\")]\nfn f() { _mm256_fmadd_ps(a, b, c) }",
            "#[target_feature(enable = \"avx2,fma,avx512f\")]\nfn f() { _mm512_add_ps(a, b) }",
            "fn f() { _mm_sfence() }",
            "asm!(\"tilezero tmm0\")",
            "// _mm512_permutex2var_epi8 is not used here\nlet s = \"_mm512_dpbf16_ps\";",
        ] {
            assert_eq!(findings(kernel), [""; 0], "{kernel}");
        }
    }

    #[test]
    fn what_is_not_looked_for_is_found() {
        for (kernel, expected) in [
            ("#[target_feature(enable = \"avx2,fma,avx512f,avx512vbmi\")]\nfn f() {}", "no set"),
            ("#[target_feature(enable = \"avx2\")]\nfn f() {}", "no set"),
            ("#[target_feature(enable = \"xsave\")]\nfn f() {}", "no set"),
            ("fn f() { _mm256_add_ps(a, b) }", "needs avx2"),
            (
                "#[target_feature(enable = \"avx2,fma,avx512f\")]\nfn f() { _mm512_permutex2var_epi8(a, b, c) }",
                "needs avx512vbmi",
            ),
            ("fn f() { _mm512_popcnt_epi64(a) }", "say which feature"),
            ("asm!(\"tdpbf16ps tmm0, tmm1, tmm2\")", "amx-bf16"),
        ] {
            let found = findings(kernel);
            assert!(found.len() == 1 && found[0].contains(expected), "{kernel}: {found:?}");
        }
    }

    #[test]
    fn each_name_is_listed_once() {
        let all: Vec<&str> = INTRINSICS.iter().flat_map(|(_, names)| names.split_whitespace()).collect();
        for (i, name) in all.iter().enumerate() {
            assert!(is_intrinsic(name) && !all[..i].contains(name), "{name}");
        }
    }
}
