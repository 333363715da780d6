defmodule VLLM.Test do
  @moduledoc """
  Engines for the tests of your application: they answer from a script, at once, without a model
  and without Python.

      llm = VLLM.Test.start!(script: %{"The capital of France is" => " Paris."})
      [output] = VLLM.generate!(llm, "The capital of France is")
      VLLM.text(output)
      #=> " Paris."

  Only the Python program is replaced. Names, supervision, deadlines, cancelling, streams and what
  happens when a worker dies are those of every engine.

  ## In your tests

  Code that calls an engine by its name needs no change. Either a test starts what it needs,

      setup do
        start_supervised!({VLLM.Test, name: MyApp.LLM, script: %{"Hello!" => "Good day."}})
        :ok
      end

  or the application starts one in its place; the options of the real one may stay:

      # config/test.exs
      config :my_app, llm: {VLLM.Test, name: MyApp.LLM, script: "Good day."}

      # config/runtime.exs
      config :my_app, llm: {VLLM, name: MyApp.LLM, model: "/models/llama", quantization: "awq"}

  ## Scripts

  A script says what is answered to each prompt, conversation or set of texts. It is one of

    * a reply, to every request;
    * a list of replies: the first request gets the first, and so on;
    * a map from prompts to replies, where a conversation's prompt is the content of its last message;
    * a function from a `VLLM.Test.Request` to a reply. It runs in a process of its own, so it may
      wait for something; if it raises, the call ends with `:internal`.

  A request that a list or a map has no reply to ends with `:unsupported`. Replies are

    * `"text"` or `{:text, "text"}`, for `VLLM.generate/3`, `VLLM.chat/3`, streams and each beam of
      `VLLM.beam_search/3`;
    * a `VLLM.CompletionOutput`, to say its `:finish_reason` too (`"stop"` if it has none), what a
      `schema:` makes of it (`:parsed`), and so on;
    * a `VLLM.ChatMessage`, to have tools called;
    * `{:numbers, [0.6, 0.8]}`: the vector of `VLLM.embed/3`, the classes of `VLLM.classify/3`, a score
      for each pair of `VLLM.score/4` and `VLLM.rerank/4`;
    * `{:deltas, ["Par", "is"]}`, the deltas of a stream; any reply may be among them, so that
      `{:deltas, ["Par", :die]}` breaks off;
    * `{:delay, ms, reply}`, which comes that much later and holds up nobody else;
    * `{:error, reason, message}` with a reason of `VLLM.Error`, or a `VLLM.Error`;
    * `:hang`, which never comes: for deadlines and cancelling;
    * `:die`: the worker ends, requests in flight get `:engine_dead`, and it is restarted;
    * in a list or a map also a function from a `VLLM.Test.Request` to one of these.

  ## What it does not do

  Sampling parameters are recorded (see `requests/1`) and not obeyed, except that `n` completions
  say the same `n` times. There is no vLLM to refuse a wrong parameter. A character counts as a
  token, and its code point as the token's id. Of log probabilities and timings there are none.
  What comes over HTTP (`VLLM.Server`, `VLLM.Plug`) is vLLM's to answer, and ends with `:unsupported`.
  """

  alias VLLM.{Error, LLM}
  alias VLLM.Engine.{Config, Lifecycle, Table}
  alias VLLM.Test.{Program, Request}

  @type script :: reply() | [reply()] | %{(prompt :: String.t()) => reply()}

  @type reply ::
          String.t()
          | {:text, String.t()}
          | %VLLM.CompletionOutput{}
          | %VLLM.ChatMessage{}
          | {:numbers, [number()]}
          | {:deltas, [reply()]}
          | {:delay, non_neg_integer(), reply()}
          | {:error, atom(), String.t()}
          | Error.t()
          | :hang
          | :die
          | (Request.t() -> reply())

  @doc """
  Starts an engine that answers from `script:` and waits until it is ready. Like one of
  `VLLM.llm/2`, it belongs to the calling process and stops when that ends.

  Other options are those of `VLLM.llm/2`, among them `name:`. Those that an engine tells of itself
  (see `VLLM.EngineInfo`), such as `max_model_len:` or the `labels:` of a classifier, it tells as
  they are given; the rest of vLLM's have no effect. Errors are `:invalid_option`, also for a name
  that is taken.

      iex> {:ok, llm} = VLLM.Test.start(script: ["Paris", {:error, :overloaded, "Later."}])
      iex> {:ok, [output]} = VLLM.generate(llm, "The capital of France is ")
      iex> VLLM.text(output)
      "Paris"
      iex> {:error, error} = VLLM.generate(llm, "The capital of Japan is ")
      iex> error.reason
      :overloaded
  """
  @spec start(keyword()) :: {:ok, LLM.t()} | {:error, Error.t()}
  def start(options) do
    {script, options} = split(options)

    with {:ok, config} <- Config.new(options),
         do: config |> scripted(script) |> Lifecycle.start(fn _ -> :ok end)
  end

  @doc """
  Like `start/1`, but returns the handle or raises `VLLM.Error`.

      iex> llm = VLLM.Test.start!(script: {:deltas, ["Par", "is"]})
      iex> llm |> VLLM.stream_text!("The capital of France is ") |> Enum.to_list()
      ["Par", "is"]
  """
  @spec start!(keyword()) :: LLM.t()
  def start!(options) do
    case start(options) do
      {:ok, llm} -> llm
      {:error, error} -> raise error
    end
  end

  @doc """
  The child spec for a supervision tree or `start_supervised!/1`, with the options of `start/1`.

      iex> VLLM.Test.child_spec(name: MyApp.LLM, script: "Paris").id
      MyApp.LLM
  """
  @spec child_spec(keyword()) :: Supervisor.child_spec()
  def child_spec(options) do
    {script, options} = split(options)
    %{start: {module, function, [config]}} = spec = VLLM.child_spec(options)
    %{spec | start: {module, function, [scripted(config, script)]}}
  end

  @doc """
  What the engine was asked so far, in order: a `VLLM.Test.Request` for each prompt, conversation
  or set of texts. Raises `VLLM.Error` if there is no such engine.

      iex> llm = VLLM.Test.start!(script: "Paris")
      iex> VLLM.generate!(llm, ["a", "b"], temperature: 0.5)
      iex> for request <- VLLM.Test.requests(llm), do: {request.prompt, request.sampling_params}
      [{"a", %{"temperature" => 0.5}}, {"b", %{"temperature" => 0.5}}]
  """
  @spec requests(VLLM.engine()) :: [Request.t()]
  def requests(engine) do
    case Table.lookup(engine) do
      {:ok, table, _pid} -> Program.requests(table)
      {:error, error} -> raise error
    end
  end

  defp split(options) do
    {script, options} = Keyword.pop(options, :script, [])
    {script, Keyword.put_new(options, :model, "script")}
  end

  defp scripted(config, script) do
    %{config | start_program: fn table -> Program.start(table, script) end}
  end
end
