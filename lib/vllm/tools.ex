defmodule VLLM.Tools do
  @moduledoc false
  # Questions that need Python and no engine: each starts a tools worker, which
  # takes half a second, asks it and ends it.

  alias VLLM.Bridge.{Deadline, MessagePack, Session}
  alias VLLM.{Error, Options}

  @doc """
  The answer to one question.

  Options: `:timeout` in milliseconds until it must be there, the worker's start
  included, by default that of `Options.tools/0`; `:python` and `:env` as of an engine.
  """
  @spec ask(String.t(), map(), keyword()) :: {:ok, term()} | {:error, Error.t()}
  def ask(method, params, options \\ []) do
    {timeout, options} = Keyword.pop(options, :timeout, default_timeout())
    deadline = Deadline.new(timeout)

    result =
      Session.run(:tools, [timeout: timeout] ++ options, fn session ->
        Session.call(session, method, params, Deadline.remaining(deadline))
      end)

    with {:error, %Error{reason: :timeout}} <- result, do: {:error, late(method, timeout)}
  end

  @doc """
  The answer to a question about a model. `options` are those of an engine and
  those of `specs`, which come before an engine's own of the same name and go
  with the question as params.
  """
  @spec about(String.t(), term(), keyword() | map(), [Options.spec()]) ::
          {:ok, term()} | {:error, Error.t()}
  def about(method, model, options, specs \\ []) do
    specs = Options.tools() ++ specs
    ours = Options.names(specs)
    engine = for spec <- Options.engine(), elem(spec, 0) not in ours, do: spec

    with {:ok, model} <- model(model),
         {:ok, known, rest} <- Options.split(options, specs),
         {:ok, engine, rest} <- Options.split(rest, engine),
         {:ok, rest} <- Options.to_wire(rest) do
      asked = known |> Map.delete(:timeout) |> Enum.reject(fn {_name, value} -> value == nil end)
      params = Map.new(asked, fn {name, value} -> {Atom.to_string(name), value} end)
      params = Map.merge(params, %{"model" => model, "options" => rest})
      where = [timeout: known.timeout, python: engine.python, env: env(engine.env)]
      ask(method, params, where)
    end
  end

  @doc "The answer to a question that is about no model."
  @spec general(String.t(), keyword() | map()) :: {:ok, term()} | {:error, Error.t()}
  def general(method, options) do
    where = for spec <- Options.engine(), elem(spec, 0) in [:python, :env], do: spec

    with {:ok, known} <- Options.only(options, Options.tools() ++ where) do
      ask(method, %{}, timeout: known.timeout, python: known.python, env: env(known.env))
    end
  end

  # Of several replicas' environments that of the first.
  defp env([env | _]), do: env
  defp env(env), do: env

  defp model(model) do
    if is_binary(model) and model != "" and MessagePack.text?(model),
      do: {:ok, Options.expand(model)},
      else:
        {:error,
         Error.new(:invalid_option, "A model is a folder, a file or a hub id, as a string.", %{
           "option" => "model"
         })}
  end

  defp late(method, timeout) do
    Error.new(
      :timeout,
      "`#{method}` was not answered within #{timeout / 1000} seconds. The machine or the hub may " <>
        "be slow: give it more time with `timeout:`.",
      %{"method" => method, "option" => "timeout", "timeout" => timeout}
    )
  end

  defp default_timeout do
    {:timeout, _type, default, _doc} = List.keyfind!(Options.tools(), :timeout, 0)
    default
  end
end
