//! A template as parsed. Chains of operators are kept flat, so that their length costs no stack.

use std::sync::Arc;

use super::value::Value;

#[derive(Debug)]
pub struct Statement {
    pub line: usize,
    pub kind: StatementKind,
}

#[derive(Debug)]
pub enum StatementKind {
    Data(Value),
    Print(Expression),
    If {
        /// `if` and each `elif`.
        branches: Vec<(Expression, Vec<Statement>)>,
        otherwise: Vec<Statement>,
    },
    For(Arc<ForLoop>),
    Set {
        target: Target,
        value: Expression,
    },
    SetBlock {
        target: Target,
        filters: Vec<Step>,
        body: Vec<Statement>,
    },
    Macro(Arc<Macro>),
    /// `{% call %}`: the expression is a call.
    Call {
        caller: Arc<Macro>,
        call: Expression,
    },
    Filter {
        filters: Vec<Step>,
        body: Vec<Statement>,
    },
    With {
        variables: Vec<(Target, Expression)>,
        body: Vec<Statement>,
    },
    /// `{% generation %}`: what is learned.
    Generation(Vec<Statement>),
    /// `{% block %}` in a template that extends nothing.
    Block(Vec<Statement>),
    Break,
    Continue,
    /// What needs other templates, of which there are none.
    NoLoader(&'static str),
}

#[derive(Debug)]
pub struct ForLoop {
    pub target: Target,
    pub iterated: Expression,
    pub condition: Option<Expression>,
    pub recursive: bool,
    pub body: Vec<Statement>,
    pub otherwise: Vec<Statement>,
}

#[derive(Debug)]
pub struct Macro {
    pub name: String,
    pub parameters: Vec<(String, Option<Expression>)>,
    pub body: Vec<Statement>,
    pub uses_varargs: bool,
    pub uses_kwargs: bool,
    pub uses_caller: bool,
}

#[derive(Debug)]
pub enum Target {
    Name(String),
    /// `namespace.attribute`
    Attribute(String, String),
    Tuple(Vec<Target>),
}

#[derive(Debug)]
pub struct Expression {
    pub line: usize,
    pub kind: ExpressionKind,
}

#[derive(Debug)]
pub enum ExpressionKind {
    Constant(Value),
    Name(String),
    Tuple(Vec<Expression>),
    List(Vec<Expression>),
    Dict(Vec<(Expression, Expression)>),
    /// `first + b - c`, or another level of operators, from left to right.
    Arithmetic {
        first: Box<Expression>,
        rest: Vec<(Operator, Expression)>,
    },
    Concat(Vec<Expression>),
    And(Vec<Expression>),
    Or(Vec<Expression>),
    /// Applied from the last to the first.
    Unary {
        operators: Vec<UnaryOperator>,
        operand: Box<Expression>,
    },
    Compare {
        first: Box<Expression>,
        rest: Vec<(Comparison, Expression)>,
    },
    Conditional {
        test: Box<Expression>,
        then: Box<Expression>,
        otherwise: Option<Box<Expression>>,
    },
    Postfix {
        base: Box<Expression>,
        steps: Vec<Step>,
    },
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Operator {
    Add,
    Subtract,
    Multiply,
    Divide,
    FloorDivide,
    Modulo,
    Power,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum UnaryOperator {
    Not,
    Minus,
    Plus,
}

#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub enum Comparison {
    Equal,
    NotEqual,
    Less,
    LessOrEqual,
    Greater,
    GreaterOrEqual,
    In,
    NotIn,
}

/// What follows a value.
#[derive(Debug)]
pub struct Step {
    pub line: usize,
    pub kind: StepKind,
}

#[derive(Debug)]
pub enum StepKind {
    Attribute(String),
    Item(Expression),
    Slice(Box<[Option<Expression>; 3]>),
    Call(Arguments),
    Filter(String, Arguments),
    Test(String, Arguments),
}

#[derive(Debug, Default)]
pub struct Arguments {
    pub positional: Vec<Expression>,
    pub keyword: Vec<(String, Expression)>,
    /// `*expression`
    pub more_positional: Option<Box<Expression>>,
    /// `**expression`
    pub more_keyword: Option<Box<Expression>>,
}
