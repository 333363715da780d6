defmodule VLLM.Tools do
  @moduledoc false
  # Questions that need Python and no engine: each starts a tools worker, which
  # takes half a second, asks it and ends it.

  alias VLLM.Bridge.{Deadline, MessagePack, Session}
  alias VLLM.{AllowedModels, Error, Options}

  # How long the worker of something that may take long may take to start, in ms.
  @start_timeout 60_000

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

    with {:ok, known, params, where} <- question(model, options, specs) do
      asked = known |> Map.delete(:timeout) |> given()

      method
      |> ask(Map.merge(asked, params), [timeout: known.timeout] ++ where)
      |> or_ours(specs)
    end
  end

  @doc """
  Has something done to a model that says how far it is, which `on_progress` is told. `options` are
  those of an engine and those of `specs`, `:timeout` and `:stall_timeout` among them.
  """
  @spec follow(String.t(), term(), keyword() | map(), [Options.spec()], (map() -> term())) ::
          {:ok, term()} | {:error, Error.t()}
  def follow(method, model, options, specs, on_progress) do
    with {:ok, known, params, where} <- question(model, options, specs),
         do: method |> followed(model, params, known, where, on_progress) |> or_ours(specs)
  end

  @doc """
  Has something done that is about no model to be loaded, and says how far it is. Of `specs`, `:timeout`
  and `:stall_timeout` among them, those go with it as params that are named in `asked`.
  """
  @spec follow_general(
          String.t(),
          map(),
          keyword() | map(),
          [Options.spec()],
          [atom()],
          (map() -> term())
        ) :: {:ok, term()} | {:error, Error.t()}
  def follow_general(method, params, options, specs, asked, on_progress) do
    with {:ok, known} <- Options.only(options, specs ++ Options.where()) do
      params = known |> Map.take(asked) |> given() |> Map.merge(params)
      followed(method, params["model"], params, known, where(known), on_progress)
    end
  end

  defp followed(method, subject, params, known, where, on_progress) do
    deadline = Deadline.new(known.timeout)
    start = [timeout: min(known.timeout, @start_timeout)]

    result =
      Session.run(:tools, start ++ where, fn session ->
        left = Deadline.remaining(deadline)
        patience = known.stall_timeout

        with {:error, %Error{reason: :timeout}} <-
               Session.follow(session, method, params, left, patience, on_progress),
             do: {:error, stalled(subject, patience)}
      end)

    with {:error, %Error{reason: :timeout}} <- result do
      if Deadline.passed?(deadline), do: {:error, late(method, known.timeout)}, else: result
    end
  end

  # A misspelt option may be one of the question's own as well as of an engine.
  defp or_ours({:error, error}, specs), do: {:error, Options.or_ours(error, specs)}
  defp or_ours(result, _specs), do: result

  @doc """
  What a question about a model is made of, checked: the values of `specs`, the params with the model
  and the options of its engine, and how the worker is started that is asked (`:python`, `:env`).
  """
  @spec question(term(), keyword() | map(), [Options.spec()]) ::
          {:ok, %{atom() => term()}, map(), keyword()} | {:error, Error.t()}
  def question(model, options, specs) do
    ours = Options.names(specs)
    engine = for spec <- Options.engine(), elem(spec, 0) not in ours, do: spec

    with {:ok, model} <- model(model),
         {:ok, known, rest} <- Options.split(options, specs),
         :ok <- named_once(rest),
         {:ok, engine, rest} <- Options.split(rest, engine),
         :ok <- AllowedModels.check(model, engine.allowed_models),
         {:ok, rest} <- Options.to_wire(rest) do
      {:ok, known, %{"model" => model, "options" => rest}, where(engine)}
    end
  end

  @doc """
  The answer to a question that is about no model to be loaded. Of `specs`, which have a `:timeout`,
  those that were given go with it as params.
  """
  @spec general(String.t(), map(), keyword() | map(), [Options.spec()]) ::
          {:ok, term()} | {:error, Error.t()}
  def general(method, params, options, specs \\ Options.tools()) do
    with {:ok, known} <- Options.only(options, specs ++ Options.where()) do
      asked = known |> Map.drop([:timeout, :python, :env]) |> given()
      ask(method, Map.merge(params, asked), [timeout: known.timeout] ++ where(known))
    end
  end

  # By which Python and in which environment; of several replicas' environments that of the first.
  defp where(%{python: python, env: env}), do: [python: python, env: env |> List.wrap() |> hd()]

  defp given(options) do
    for {name, value} <- options, value != nil, into: %{}, do: {Atom.to_string(name), value}
  end

  defp model(model) do
    if is_binary(model) and model != "" and MessagePack.text?(model),
      do: {:ok, Options.expand(model)},
      else:
        {:error,
         Error.new(:invalid_option, "A model is a folder, a file or a hub id, as a string.", %{
           "option" => "model"
         })}
  end

  defp named_once(%{"model" => _other}) do
    message = "The model is an argument of its own here: leave `model` out of the options."
    {:error, Error.new(:invalid_option, message, %{"option" => "model"})}
  end

  defp named_once(_options), do: :ok

  defp late(method, timeout) do
    Error.new(
      :timeout,
      "`#{method}` was not answered within #{timeout / 1000} seconds. The machine or the hub may " <>
        "be slow: give it more time with `timeout:`.",
      %{"method" => method, "option" => "timeout", "timeout" => timeout}
    )
  end

  defp stalled(model, timeout) do
    Error.new(
      :timeout,
      "Nothing of `#{model}` has come or gone for #{timeout / 1000} seconds (`stall_timeout:`). What was " <>
        "done before is kept: try again, and it goes on from there.",
      %{"option" => "stall_timeout", "timeout" => timeout}
    )
  end

  defp default_timeout do
    {:timeout, _type, default, _doc} = List.keyfind!(Options.tools(), :timeout, 0)
    default
  end
end
