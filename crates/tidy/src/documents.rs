//! Links in Markdown files lead to files that exist, and to headings that
//! exist in them. Links to other sites are not followed.

use crate::{Finding, Tree};

/// Every link of every Markdown file.
pub fn check(tree: &Tree) -> Vec<Finding> {
    let mut findings = Vec::new();
    for (file, text) in tree.texts(&["md"]) {
        let folder = file.path.rsplit_once('/').map_or("", |(folder, _)| folder);
        for (index, target) in links(text) {
            if let Some(message) = broken(tree, &file.path, folder, &target) {
                findings.push(Finding::line(&file.path, index, message));
            }
        }
    }
    findings
}

/// Why a link leads nowhere, if it does.
fn broken(tree: &Tree, from: &str, folder: &str, target: &str) -> Option<String> {
    if target.contains("://") || target.starts_with("mailto:") {
        return None;
    }
    let (path, heading) =
        target.split_once('#').map_or((target, None), |(path, heading)| (path, Some(heading)));
    let Some(resolved) = (if path.is_empty() { Some(from.to_owned()) } else { resolve(folder, path) }) else {
        return Some(format!("the link '{target}' leaves the repository"));
    };
    if !tree.exists(&resolved) {
        return Some(format!("the link '{target}' leads to no file"));
    }
    let heading = heading.filter(|_| resolved.ends_with(".md"))?;
    let text = tree.text(&resolved)?;
    let found = headings(text).iter().any(|anchor| anchor == heading);
    (!found).then(|| format!("the link '{target}' leads to no heading"))
}

/// `folder/path` without `.` and `..`, or nothing if it leaves the root.
fn resolve(folder: &str, path: &str) -> Option<String> {
    let mut parts: Vec<&str> = Vec::new();
    for part in folder.split('/').chain(path.split('/')) {
        match part {
            "" | "." => {}
            ".." => {
                parts.pop()?;
            }
            part => parts.push(part),
        }
    }
    Some(parts.join("/"))
}

/// Lines outside fenced code, with their indices.
fn prose(text: &str) -> impl Iterator<Item = (usize, &str)> {
    let mut fenced = false;
    text.lines().enumerate().filter(move |(_, line)| {
        let fence = line.trim_start().starts_with("```");
        fenced ^= fence;
        !fenced && !fence
    })
}

/// Targets of `[text](target)`, `![text](target)`, `<img src="target">`, `<a href="target">` and of
/// reference definitions, with the index of their line.
fn links(text: &str) -> Vec<(usize, String)> {
    let mut links = Vec::new();
    for (index, line) in prose(text) {
        let line = without_code(line);
        for (open, close) in [("](", ')'), ("src=\"", '"'), ("href=\"", '"')] {
            for (at, _) in line.match_indices(open) {
                let rest = &line[at + open.len()..];
                // A title may follow the target: [text](target "title").
                let target = rest.split(close).next().unwrap_or(rest).split_whitespace().next();
                links.extend(target.map(|target| (index, target.to_owned())));
            }
        }
        let definition = line.strip_prefix('[').and_then(|rest| rest.split_once("]: "));
        let target = definition.and_then(|(_, rest)| rest.split_whitespace().next());
        links.extend(target.map(|target| (index, target.to_owned())));
    }
    links
}

/// The line with what stands between backticks taken out.
fn without_code(line: &str) -> String {
    line.split('`').step_by(2).collect()
}

/// Anchors of the headings, as the usual renderers make them.
fn headings(text: &str) -> Vec<String> {
    prose(text)
        .filter(|(_, line)| line.starts_with('#'))
        .map(|(_, line)| {
            let title = line.trim_start_matches('#').trim().to_lowercase();
            let kept = title.chars().filter(|c| c.is_alphanumeric() || matches!(c, ' ' | '-' | '_'));
            kept.map(|c| if c == ' ' { '-' } else { c }).collect()
        })
        .collect()
}

#[cfg(test)]
mod tests {
    //! Links that lead somewhere, and links that do not.
    use super::*;

    fn findings(text: &str) -> Vec<Finding> {
        check(&Tree::sample(&[
            ("docs/a.md", text),
            ("docs/b.md", "# Title\n\n## Who may know whom?\n\n```\n# not a heading\n```\n"),
            ("docs/images/a.png", ""),
            ("README.md", "# Root\n"),
            ("LICENSE", ""),
        ]))
    }

    #[test]
    fn good_links_pass() {
        for link in [
            "[b](b.md)",
            "[b](./b.md#who-may-know-whom)",
            "[up](../README.md) and [licence](../LICENSE \"MIT\")",
            "![picture](images/a.png)",
            "<img src=\"images/a.png\" width=\"64\">",
            "[folder](images/)",
            "[site](https://example.org/missing)",
            "[mail](mailto:nobody@example.org)",
            "[b]: b.md",
            "# Here\n[here](#here)",
            "`[not](a-link)`",
            "```\n[not](a-link)\n```",
        ] {
            assert_eq!(findings(link), [], "{link}");
        }
    }

    #[test]
    fn links_to_nowhere_are_found() {
        for link in [
            "[x](missing.md)",
            "[x](b.md#no-such-heading)",
            "[x](b.md#not-a-heading)",
            "[x](#nowhere)",
            "[x](../../outside.md)",
            "![x](images/b.png)",
            "<img src=\"images/b.png\">",
            "[x]: missing.md",
            "[fine](b.md) [x](missing.md)",
            "`code` [x](missing.md)",
        ] {
            let found = findings(&format!("words\n\n{link}\n"));
            assert_eq!(found.len(), 1, "{link}");
            assert_eq!(found[0].line, Some(3));
        }
    }
}
