//! What follows a value: attributes, items, calls, filters and tests.

use super::super::ast::{Arguments, Expression, ExpressionKind, Step, StepKind};
use super::super::failure::Result;
use super::super::lexer::{Token, syntax};
use super::super::value::Value;
use super::Parser;
use super::expressions::postfix;

impl Parser {
    /// Attributes, items and calls; then, if wanted, filters, tests and calls.
    pub(super) fn steps(&mut self, with_filters: bool) -> Result<Vec<Step>> {
        let mut steps = Vec::new();
        let mut filtered = false;
        loop {
            let line = self.line();
            let kind = match self.peek() {
                Token::Operator("(") => StepKind::Call(self.arguments()?),
                Token::Operator("." | "[") if !filtered => self.subscript()?,
                Token::Operator("|") if with_filters => {
                    self.at += 1;
                    filtered = true;
                    self.filter()?
                }
                Token::Name(name) if name == "is" && with_filters => {
                    filtered = true;
                    self.at += 1;
                    let negated = self.skip_name("not");
                    let kind = self.test(line)?;
                    steps.push(Step { line, kind });
                    if !negated {
                        continue;
                    }
                    // `x is not y` is the opposite of a test.
                    StepKind::Test("false".to_owned(), Arguments::default())
                }
                _ => return Ok(steps),
            };
            steps.push(Step { line, kind });
            self.check_chain(steps.len())?;
        }
    }

    fn subscript(&mut self) -> Result<StepKind> {
        if self.skip_operator(".") {
            return match self.next() {
                Token::Name(name) => Ok(StepKind::Attribute(name)),
                Token::Integer(value) => Ok(StepKind::Item(Expression {
                    line: self.line(),
                    kind: ExpressionKind::Constant(Value::Int(value)),
                })),
                found => {
                    self.at -= 1;
                    Err(self.unexpected(&found, "a name after `.`"))
                }
            };
        }
        self.expect_operator("[")?;
        let line = self.line();
        let mut items = vec![self.subscript_item()?];
        while self.skip_operator(",") {
            items.push(self.subscript_item()?);
        }
        self.expect_operator("]")?;
        if items.len() == 1 {
            return Ok(items.remove(0));
        }
        let items = items.into_iter().map(|item| match item {
            StepKind::Item(expression) => Ok(expression),
            _ => Err(syntax("a slice cannot be one of several indices", line)),
        });
        let kind = ExpressionKind::Tuple(items.collect::<Result<_>>()?);
        Ok(StepKind::Item(Expression { line, kind }))
    }

    fn subscript_item(&mut self) -> Result<StepKind> {
        let mut parts = [None, None, None];
        let mut colons = 0;
        loop {
            match self.peek() {
                Token::Operator(":") if colons < 2 => {
                    self.at += 1;
                    colons += 1;
                }
                Token::Operator("]" | ",") if colons > 0 => break,
                _ if parts[colons].is_none() => parts[colons] = Some(self.expression()?),
                _ => break,
            }
        }
        match (colons, parts) {
            (0, [Some(index), ..]) => Ok(StepKind::Item(index)),
            (_, parts) => Ok(StepKind::Slice(Box::new(parts))),
        }
    }

    /// `| name(..) | name`, of which the first `|` may be left out.
    pub(super) fn filters(&mut self, starts_with_name: bool) -> Result<Vec<Step>> {
        let mut filters = Vec::new();
        let mut named = starts_with_name;
        while named || self.skip_operator("|") {
            named = false;
            let line = self.line();
            let kind = self.filter()?;
            filters.push(Step { line, kind });
            self.check_chain(filters.len())?;
        }
        Ok(filters)
    }

    fn filter(&mut self) -> Result<StepKind> {
        let name = self.dotted_name()?;
        let arguments = match self.peek() {
            Token::Operator("(") => self.arguments()?,
            _ => Arguments::default(),
        };
        Ok(StepKind::Filter(name, arguments))
    }

    fn test(&mut self, line: usize) -> Result<StepKind> {
        let name = self.dotted_name()?;
        let takes_operand = match self.peek() {
            Token::Operator("(") => {
                let arguments = self.arguments()?;
                return Ok(StepKind::Test(name, arguments));
            }
            Token::Name(word) if word == "is" => {
                return Err(syntax("tests cannot be chained with `is`", line));
            }
            Token::Name(word) => !["else", "or", "and"].contains(&word.as_str()),
            Token::Text(_) | Token::Integer(_) | Token::Float(_) => true,
            Token::Operator(operator) => ["[", "{"].contains(operator),
            _ => false,
        };
        let mut arguments = Arguments::default();
        if takes_operand {
            let operand = self.primary()?;
            let steps = self.steps(false)?;
            arguments.positional.push(postfix(operand, steps));
        }
        Ok(StepKind::Test(name, arguments))
    }

    fn dotted_name(&mut self) -> Result<String> {
        let mut name = self.name()?;
        while self.skip_operator(".") {
            name = format!("{name}.{}", self.name()?);
        }
        Ok(name)
    }

    fn arguments(&mut self) -> Result<Arguments> {
        self.expect_operator("(")?;
        let mut arguments = Arguments::default();
        let mut first = true;
        while !self.skip_operator(")") {
            if !first {
                self.expect_operator(",")?;
                if self.skip_operator(")") {
                    break;
                }
            }
            first = false;
            self.argument(&mut arguments)?;
        }
        Ok(arguments)
    }

    fn argument(&mut self, arguments: &mut Arguments) -> Result<()> {
        let line = self.line();
        let misplaced = || syntax("the arguments of a call are out of order", line);
        if self.skip_operator("**") {
            let value = self.expression()?;
            let had = arguments.more_keyword.replace(Box::new(value));
            return had.map_or(Ok(()), |_| Err(misplaced()));
        }
        if self.skip_operator("*") {
            let value = self.expression()?;
            let had = arguments.more_positional.replace(Box::new(value));
            return had.map_or(Ok(()), |_| Err(misplaced()));
        }
        let next = self.tokens.get(self.at + 1).map(|located| &located.token);
        if let (Token::Name(name), Some(Token::Operator("="))) = (self.peek(), next) {
            let name = name.clone();
            self.at += 2;
            let value = self.expression()?;
            if arguments.more_keyword.is_some() {
                return Err(misplaced());
            }
            arguments.keyword.push((name, value));
            return Ok(());
        }
        let value = self.expression()?;
        if !arguments.keyword.is_empty()
            || arguments.more_positional.is_some()
            || arguments.more_keyword.is_some()
        {
            return Err(misplaced());
        }
        arguments.positional.push(value);
        Ok(())
    }
}
