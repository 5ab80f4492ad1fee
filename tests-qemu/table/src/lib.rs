//! Tables for people: columns of names, then numbers.

/// A table under construction.
#[derive(Debug, Clone)]
pub struct Table {
    rows: Vec<Vec<String>>,
    /// Columns of names, which are aligned to the left.
    names: usize,
}

impl Table {
    /// A table with these headings.
    pub fn new(headings: &[&str]) -> Self {
        Self { rows: vec![headings.iter().map(|&heading| heading.to_owned()).collect()], names: 1 }
    }

    /// Adds a row. `None` stands for an absent value.
    pub fn row(&mut self, name: &str, numbers: impl IntoIterator<Item = Option<u64>>) {
        self.row_of(&[name], numbers);
    }

    /// Adds a row with as many names as all other rows.
    pub fn row_of(&mut self, names: &[&str], numbers: impl IntoIterator<Item = Option<u64>>) {
        self.names = names.len();
        let names = names.iter().map(|&name| name.to_owned());
        let numbers = numbers.into_iter().map(|number| number.map_or("-".to_owned(), grouped));
        self.rows.push(names.chain(numbers).collect());
    }

    /// The table as text, one line per row.
    pub fn render(&self) -> String {
        let columns = self.rows.iter().map(Vec::len).max().unwrap_or(0);
        let width = |column: usize| self.rows.iter().filter_map(|row| Some(row.get(column)?.len())).max().unwrap_or(0);
        let widths: Vec<usize> = (0..columns).map(width).collect();
        let mut text = String::new();
        for (index, row) in self.rows.iter().enumerate() {
            let cells = row.iter().zip(&widths).enumerate().map(|(column, (cell, &width))| {
                if column < self.names { format!("{cell:<width$}") } else { format!("{cell:>width$}") }
            });
            text.push_str(&format!("  {}\n", cells.collect::<Vec<_>>().join("  ")));
            if index == 0 {
                let rule = widths.iter().sum::<usize>() + 2 * widths.len().saturating_sub(1);
                text.push_str(&format!("  {}\n", "-".repeat(rule)));
            }
        }
        text
    }
}

/// `1234567` as `1,234,567`.
pub fn grouped(number: u64) -> String {
    let digits = number.to_string();
    let mut text = String::new();
    for (index, digit) in digits.char_indices() {
        if index > 0 && (digits.len() - index).is_multiple_of(3) {
            text.push(',');
        }
        text.push(digit);
    }
    text
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn numbers_are_grouped_by_thousands() {
        let grouped = [0, 999, 1000, 1_234_567].map(grouped);
        assert_eq!(grouped, ["0", "999", "1,000", "1,234,567"]);
    }

    #[test]
    fn columns_line_up() {
        let mut table = Table::new(&["operation", "ticks"]);
        table.row("CPUID", [Some(18_011)]);
        table.row("MOV CR3", [None]);
        let expected = "  operation   ticks\n  -----------------\n  CPUID      18,011\n  MOV CR3         -\n";
        assert_eq!(table.render(), expected);
    }
}
