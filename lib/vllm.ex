defmodule VLLM do
  @moduledoc """
  Language models on your own machine: [vLLM](https://docs.vllm.ai) under OTP supervision.

      llm = VLLM.llm!("TheBloke/Llama-2-7B-AWQ", quantization: "awq")
      [output] = VLLM.generate!(llm, "The capital of France is", max_tokens: 16, temperature: 0.0)
      VLLM.text(output)
      VLLM.stop(llm)

  An **engine** is one model with its options. Each runs in Python processes of its own, which
  Elixir starts, watches and removes; there is nothing else to deploy. Calls from any number of
  processes run at once, and vLLM computes them together.

  ## An engine of your supervision tree

      children = [
        {VLLM, name: MyApp.LLM, model: "/models/llama", quantization: "awq", kv_cache_dtype: "fp8"}
      ]

  Starting does not hold up your application: the engine loads in the background, and calls made
  meanwhile wait for it until their own deadline (see also `await_ready/2`). Calls then take the
  name: `VLLM.generate(MyApp.LLM, "…")`.

  ## Engine options

  Options are a keyword list or a map. Of one that a keyword list has twice, the first counts, as with
  `Keyword.get/2`: `mine ++ defaults`.

  Of this library:

  #{VLLM.Options.docs(VLLM.Options.engine())}

  All others are vLLM's engine arguments, by vLLM's names, checked by the installed vLLM; nested
  ones are maps or keyword lists. The usual ones:

  #{VLLM.Options.engine_argument_docs()}

  ## Engines on other nodes

  A node without a device calls the engine on one that has it, over Erlang's distribution:
  `VLLM.generate({MyApp.LLM, :"gpu@box"}, "…")`. All functions of this module take such an engine and
  mean the same; see guides/clusters.md. `VLLM.Cluster` has one name stand for the engines of several
  nodes.

  ## Errors

  Functions return `{:ok, result}` or `{:error, %VLLM.Error{}}`; those with `!` return the result
  or raise the error. See `VLLM.Error` for the reasons.

  ## When not to use it

  For a model that several machines or programs in other languages use, run `vllm serve` and talk
  HTTP to it. One engine needs the model in the memory of this machine's device; it does not help
  where there is none to spare.
  """

  import VLLM.Error, only: [bang!: 1]

  alias VLLM.Engine.Lifecycle

  alias VLLM.{
    Admin,
    BeamSearch,
    BeamSearchOutput,
    BeamSearchParams,
    Chat,
    ChatMessage,
    Classification,
    Completions,
    Embedding,
    Error,
    LLM,
    LoRA,
    LoRARequest,
    Options,
    Pooling,
    PoolingOutput,
    PoolingParams,
    Remote,
    Replica,
    RequestOutput,
    SamplingParams,
    Score,
    StructuredOutputsParams,
    Tokenizer,
    Usage
  }

  @typedoc """
  An engine: its handle, its name, or the pid of its supervisor. Of one on another node its handle or
  pid, its name as `{MyApp.LLM, :"gpu@box"}`, or a `:global` name. Of several engines that `VLLM.Cluster`
  knows their name.
  """
  @type engine :: LLM.t() | GenServer.name() | pid()

  @typedoc """
  A prompt: a string, tokens as `%{prompt_token_ids: [1, 2, 3]}`, embeddings, or either of the first
  two with images.

  Embeddings are what goes into the model's first layer in place of tokens:
  `%{prompt_embeds: data, shape: {tokens, hidden_size}}` with a binary of little-endian 32-bit floats,
  row by row, such as `%{prompt_embeds: Nx.to_binary(t), shape: Nx.shape(t)}`. The worker turns them
  into the model's dtype. Only what completes prompts and needs no tokens takes them (`generate/3` and
  the streams), on an engine with `enable_prompt_embeds: true`; others answer with `:unsupported` or
  `:invalid_prompt`. In the output, each of them counts as a token with the id 0.

  Some models take images: `%{prompt: "USER: <image>\\nWhat is it?", multi_modal_data: %{image: image}}`
  with one image or a list of them, or `:prompt_token_ids` in place of `:prompt`. An image is
  `{:file, path}`, read by the caller; `{:binary, bytes}`, of PNG, JPEG or another format of a file; or
  `{:url, url}`, fetched by the worker (`data:`, `http:`, `https:`, and `file:` in the folder of the engine's
  `allowed_local_media_path`; the engine's `allowed_media_domains` says from which hosts). How a prompt
  marks the place of an image depends on the model; conversations need not know it, and give an image as
  `%{type: "image_url", image_url: %{url: url}}`. In a prompt, what cannot be read is `:invalid_prompt`,
  and an image for a model that takes none `:unsupported`.
  """
  @type prompt ::
          String.t()
          | %{prompt_token_ids: [non_neg_integer()]}
          | %{prompt_embeds: binary(), shape: {pos_integer(), pos_integer()}}
          | %{prompt: String.t(), multi_modal_data: %{image: image() | [image()]}}
          | %{
              prompt_token_ids: [non_neg_integer()],
              multi_modal_data: %{image: image() | [image()]}
            }

  @typedoc "An image of a prompt, see `t:prompt/0`."
  @type image :: {:file, Path.t()} | {:binary, binary()} | {:url, String.t()}

  @typedoc """
  A conversation: messages as maps or keyword lists in the shape of OpenAI's chat API, such as
  `[%{role: "user", content: "Hello!"}]`, and `VLLM.ChatMessage`s.
  """
  @type conversation :: [ChatMessage.t() | keyword() | %{optional(atom() | String.t()) => term()}]

  @doc """
  Starts an engine for `model`, a folder, a GGUF file, a name of `VLLM.Models` (`"llama:Q4_K_M"`) or a
  name on the Hugging Face hub, and waits until it is ready. A model of the hub (`"org/name"`,
  `"org/name:Q8_0"`) is downloaded unless it is here; see `VLLM.Hub` and guides/hub.md.

  The engine belongs to the calling process and stops when that ends. To have it outlive its
  caller, put `{VLLM, name: …, model: …}` into a supervision tree.

  See the module's docs for the options. If the engine cannot start, nothing of it is left and the
  error says why: `:model_not_found`, `:not_a_model`, `:model_gated`, `:hub_unreachable`,
  `:disk_full`, `:unsupported_quantization`, `:out_of_memory`, `:invalid_option`, `:load_timeout`, ….
  `VLLM.Quantization.check/2` tells most of these without an engine.

      {:ok, llm} = VLLM.llm("/models/llama", max_model_len: 4096)
  """
  @spec llm(String.t(), keyword() | map()) :: {:ok, LLM.t()} | {:error, Error.t()}
  def llm(model, options \\ []), do: Lifecycle.llm(model, options)

  @doc "Like `llm/2`, but returns the handle or raises `VLLM.Error`."
  @spec llm!(String.t(), keyword() | map()) :: LLM.t()
  def llm!(model, options \\ []), do: bang!(llm(model, options))

  @doc """
  The child spec for a supervision tree: `{VLLM, name: MyApp.LLM, model: "…"}`.

  Raises `VLLM.Error` for options that this library knows to be wrong. What vLLM says against the
  model or its options does not take the tree down: the engine stays up and answers every call
  with the error.

      iex> VLLM.child_spec(name: MyApp.LLM, model: "/models/llama").id
      MyApp.LLM
  """
  @spec child_spec(keyword() | map()) :: Supervisor.child_spec()
  def child_spec(options), do: bang!(Lifecycle.child_spec(options, __MODULE__))

  @doc """
  Waits until the engine serves requests, for at most `timeout` milliseconds.

  An engine that cannot start gives the reason as its error.

      :ok = VLLM.await_ready(MyApp.LLM, 60_000)
  """
  @spec await_ready(engine(), timeout()) :: :ok | {:error, Error.t()}
  def await_ready(engine, timeout \\ :infinity), do: Admin.await_ready(engine, timeout)

  @doc "Like `await_ready/2`, but raises `VLLM.Error`."
  @spec await_ready!(engine(), timeout()) :: :ok
  def await_ready!(engine, timeout \\ :infinity), do: bang!(await_ready(engine, timeout))

  @doc """
  Stops the engine and returns when nothing of it is left.

  It takes no request any more. Those in flight may finish for as long as the engine's
  `shutdown_timeout:` says, then they end with `:shutdown`. The same happens when the engine's owner
  or its supervisor ends. An engine that has ended already is no error.

      :ok = VLLM.stop(llm)
  """
  @spec stop(engine()) :: :ok | {:error, Error.t()}
  def stop(engine), do: Remote.run(engine, :stop)

  @doc "Like `stop/1`, but raises `VLLM.Error`."
  @spec stop!(engine()) :: :ok
  def stop!(engine), do: bang!(stop(engine))

  @doc """
  The replicas of an engine and how each is: a list of `VLLM.Replica`s by their index.

      {:ok, [%VLLM.Replica{index: 1, state: :ready, in_flight: 0}]} = VLLM.replicas(llm)
  """
  @spec replicas(engine()) :: {:ok, [Replica.t()]} | {:error, Error.t()}
  def replicas(engine), do: Remote.run(engine, :replicas)

  @doc "Like `replicas/1`, but returns the list or raises `VLLM.Error`."
  @spec replicas!(engine()) :: [Replica.t()]
  def replicas!(engine), do: bang!(replicas(engine))

  @doc """
  Gives the engine `count` replicas and returns when it has them.

  New ones are ready then; if one cannot start, all new ones go again and its error is returned
  (`:out_of_memory`, …). The ones that are too many, those with the highest numbers, take no request
  any more, finish what they have and end. With `devices:` there can be as many as it has entries.

  #{Options.docs(Options.drain())}

  For example:

      :ok = VLLM.scale(llm, 2)
  """
  @spec scale(engine(), pos_integer(), keyword() | map()) :: :ok | {:error, Error.t()}
  def scale(engine, count, options \\ []), do: Remote.run(engine, {:scale, count, options})

  @doc "Like `scale/3`, but raises `VLLM.Error`."
  @spec scale!(engine(), pos_integer(), keyword() | map()) :: :ok
  def scale!(engine, count, options \\ []), do: bang!(scale(engine, count, options))

  @doc """
  Takes a replica out of service: it takes no request any more, finishes what it has and ends; its
  device is free when this returns. `restart/3` brings it back.

  The other replicas serve on. Where there is none, calls end with `:not_running`.

  #{Options.docs(Options.drain())}

  For example:

      :ok = VLLM.drain(llm, 2)
  """
  @spec drain(engine(), pos_integer(), keyword() | map()) :: :ok | {:error, Error.t()}
  def drain(engine, replica, options \\ []), do: Remote.run(engine, {:drain, replica, options})

  @doc "Like `drain/3`, but raises `VLLM.Error`."
  @spec drain!(engine(), pos_integer(), keyword() | map()) :: :ok
  def drain!(engine, replica, options \\ []), do: bang!(drain(engine, replica, options))

  @doc """
  Starts a replica anew, or all of them, and returns when they are ready or with the error of one
  that is not.

  That brings back what has failed or was drained. Replicas that serve finish what they have before,
  one after another; calls wait where there is no other.

  #{Options.docs(Options.drain())}

  For example:

      :ok = VLLM.restart(llm)
      :ok = VLLM.restart(llm, 2, timeout: 60_000)
  """
  @spec restart(engine(), pos_integer() | :all, keyword() | map()) :: :ok | {:error, Error.t()}
  def restart(engine, replica \\ :all, options \\ []),
    do: Remote.run(engine, {:restart, replica, options})

  @doc "Like `restart/3`, but raises `VLLM.Error`."
  @spec restart!(engine(), pos_integer() | :all, keyword() | map()) :: :ok
  def restart!(engine, replica \\ :all, options \\ []),
    do: bang!(restart(engine, replica, options))

  @doc """
  Gives an engine new options while it serves, also another `model:`; those that are not given stay.

  One replica after another finishes what it has and starts with them, so that no request is lost.
  A single replica serves on until another is ready beside it; where the memory does not hold both,
  it ends first, and calls wait. If one does not start, it and all before it go back to the options
  that they had, and its error is returned. `name` and `replicas` stay (see `scale/3`).
  An engine in a supervision tree has the options of its child spec again when its supervisor
  restarts it.

  #{Options.docs(Options.drain())}

  For example:

      :ok = VLLM.reload(llm, max_model_len: 8192)
      :ok = VLLM.reload(llm, [model: "/models/llama-2"], timeout: 60_000)
  """
  @spec reload(engine(), keyword() | map(), keyword() | map()) :: :ok | {:error, Error.t()}
  def reload(engine, new_options, options \\ []),
    do: Remote.run(engine, {:reload, new_options, options})

  @doc "Like `reload/3`, but raises `VLLM.Error`."
  @spec reload!(engine(), keyword() | map(), keyword() | map()) :: :ok
  def reload!(engine, new_options, options \\ []),
    do: bang!(reload(engine, new_options, options))

  @doc """
  Completes one prompt or a list of them; the results come in the order of the prompts.

  Sampling parameters (see `VLLM.SamplingParams`) are given inline or as `sampling_params:`. One
  prompt that cannot be completed ends the call with its error (`details["prompt_index"]` says
  which) and cancels the others.

  ## Options

  #{Options.docs(Options.generate())}

  ## Errors

  `:invalid_option`, `:invalid_prompt`, `:prompt_too_long`, `:timeout`, `:queue_timeout`,
  `:overloaded`, `:engine_dead`, `:poison`, `:shutdown`, `:not_running`, and those of an engine that
  could not start.

      {:ok, [output]} = VLLM.generate(llm, "The capital of France is", temperature: 0.0)
      hd(output.outputs).text
  """
  @spec generate(engine(), prompt() | [prompt()], keyword() | map()) ::
          {:ok, [RequestOutput.t()]} | {:error, Error.t()}
  def generate(engine, prompts, options \\ []),
    do: Completions.generate(engine, prompts, options)

  @doc """
  Like `generate/3`, but returns the outputs or raises `VLLM.Error`.

      VLLM.generate!(llm, ["a", "b"], sampling_params: VLLM.sampling_params!(temperature: 0.8, n: 2))
  """
  @spec generate!(engine(), prompt() | [prompt()], keyword() | map()) :: [RequestOutput.t()]
  def generate!(engine, prompts, options \\ []), do: bang!(generate(engine, prompts, options))

  @doc """
  Searches the likeliest completions of one prompt or of each of a list of them: at each step, the
  `beam_width` likeliest beginnings are kept. The results come in the order of the prompts.

  `beam_width` and `max_tokens` must be given; they and other parameters (see
  `VLLM.BeamSearchParams`) are given inline or as `beam_search_params:`. One prompt that cannot be
  completed ends the call with its error (`details["prompt_index"]` says which) and cancels the
  others.

  ## Options

  #{Options.docs(Options.beam_search())}

  ## Errors

  Those of `generate/3`. The engine option `max_logprobs:` (20) must be twice the `beam_width` at
  least, else `:invalid_option`. Prompts of embeddings are `:unsupported`.

      {:ok, [output]} = VLLM.beam_search(llm, "The capital of France is", beam_width: 4, max_tokens: 16)
      for beam <- output.sequences, do: {beam.text, beam.cum_logprob}
  """
  @spec beam_search(engine(), prompt() | [prompt()], keyword() | map()) ::
          {:ok, [BeamSearchOutput.t()]} | {:error, Error.t()}
  def beam_search(engine, prompts, options), do: BeamSearch.search(engine, prompts, options)

  @doc """
  Like `beam_search/3`, but returns the outputs or raises `VLLM.Error`.

      [output] = VLLM.beam_search!(llm, "The capital of France is", beam_width: 4, max_tokens: 16)
      hd(output.sequences).text
  """
  @spec beam_search!(engine(), prompt() | [prompt()], keyword() | map()) :: [BeamSearchOutput.t()]
  def beam_search!(engine, prompts, options), do: bang!(beam_search(engine, prompts, options))

  @doc """
  Answers one conversation or each of a list of them; the results come in their order.

  Messages become a prompt by the model's chat template. What the model writes is in each
  completion's `:text`, and taken apart in its `:message`, a `VLLM.ChatMessage`: what it says, what it
  thought (with a `reasoning_parser:`) and the tools that it wants called (with `tools:` and a
  `tool_call_parser:`).

      messages = [
        %{role: "system", content: "You are brief."},
        %{role: "user", content: "What is the capital of France?"}
      ]

      [output] = VLLM.chat!(llm, messages, max_tokens: 64)
      hd(output.outputs).message.content

  As in vLLM, an answer has 16 tokens at most unless the model's defaults or `max_tokens:` say
  something else.

  ## Tools

      tools = [
        %{
          type: "function",
          function: %{
            name: "get_weather",
            description: "The weather of a city.",
            parameters: %{
              type: "object",
              properties: %{city: %{type: "string", enum: ["Paris", "Tokyo"]}},
              required: ["city"]
            }
          }
        }
      ]

      messages = [%{role: "user", content: "Will it rain in Paris?"}]
      options = [tools: tools, tool_choice: "required", tool_call_parser: "hermes"]
      options = options ++ [max_tokens: 256, temperature: 0]
      [output] = VLLM.chat!(llm, messages, options)
      [%VLLM.ToolCall{name: "get_weather", parsed: %{"city" => city}}] =
        hd(output.outputs).message.tool_calls

  Which parser fits a model is in its documentation, or vLLM's. `VLLM.ChatMessage` shows how the
  conversation goes on.

  ## Options

  Sampling parameters (see `VLLM.SamplingParams`) are given inline or as `sampling_params:`.

  #{Options.docs(Options.chat())}

  ## Errors

  Those of `generate/3`. Messages that are none, or that the template refuses, are
  `:invalid_prompt`, with `details["message_index"]` where one is to blame; a parser that vLLM does
  not have is `:invalid_option`, with `details["allowed"]`.
  """
  @spec chat(engine(), conversation() | [conversation()], keyword() | map()) ::
          {:ok, [RequestOutput.t()]} | {:error, Error.t()}
  def chat(engine, messages, options \\ []), do: Chat.chat(engine, messages, options)

  @doc """
  Like `chat/3`, but returns the outputs or raises `VLLM.Error`.

      [output] = VLLM.chat!(llm, [[role: "user", content: "Hello!"]], temperature: 0.0)
      VLLM.text(output)
  """
  @spec chat!(engine(), conversation() | [conversation()], keyword() | map()) :: [
          RequestOutput.t()
        ]
  def chat!(engine, messages, options \\ []), do: bang!(chat(engine, messages, options))

  @doc """
  Answers one conversation as a stream: a lazy enumerable of `{:ok, %VLLM.Delta{}}`, and at last
  `{:error, %VLLM.Error{}}` if it ends with an error.

  The `:message` of a delta says what it adds to the model's message: a `VLLM.MessageDelta` with
  the bits of what it says and thinks, and of its tool calls. Options and errors are those of
  `chat/3`, with those of `stream/3`; else it is like that.

      llm
      |> VLLM.chat_stream([%{role: "user", content: "Count to ten."}], max_tokens: 64)
      |> Enum.each(fn {:ok, delta} -> IO.write(delta.message.content) end)
  """
  @spec chat_stream(engine(), conversation(), keyword() | map()) :: Enumerable.t()
  def chat_stream(engine, messages, options \\ []),
    do: Chat.stream(engine, messages, options)

  @doc """
  Like `chat_stream/3`, but yields the deltas themselves and raises `VLLM.Error`.

      for delta <- VLLM.chat_stream!(llm, [%{role: "user", content: "Hello!"}]), do: delta.message
  """
  @spec chat_stream!(engine(), conversation(), keyword() | map()) :: Enumerable.t()
  def chat_stream!(engine, messages, options \\ []),
    do: Chat.stream!(engine, messages, options)

  @doc """
  Streams the answer to one conversation to a process, as `stream_to/4` does for a prompt; the
  messages that it sends are the same, and `cancel/1` ends it. The output of the last one has the
  whole message.

      ref = VLLM.chat_stream_to(MyApp.LLM, [%{role: "user", content: "Count to ten."}])
      receive do: ({:vllm, ^ref, %VLLM.Delta{message: message}} -> message.content)
  """
  @spec chat_stream_to(engine(), conversation(), pid(), keyword() | map()) :: reference()
  def chat_stream_to(engine, messages, pid \\ self(), options \\ []),
    do: Chat.stream_to(engine, messages, pid, options)

  @doc """
  The prompt that a conversation becomes, as a map with `:prompt` (the text) and
  `:prompt_token_ids`, which `generate/3` takes; of a list of conversations, a list of prompts.

  ## Options

  #{Options.docs(Options.apply_chat_template())}

  Errors are those of `chat/3`.

      {:ok, prompt} = VLLM.apply_chat_template(llm, [%{role: "user", content: "Hello!"}])
      prompt.prompt
      VLLM.generate(llm, prompt, max_tokens: 64)
  """
  @spec apply_chat_template(engine(), conversation() | [conversation()], keyword() | map()) ::
          {:ok, rendered | [rendered]} | {:error, Error.t()}
        when rendered: %{prompt: String.t(), prompt_token_ids: [non_neg_integer()]}
  def apply_chat_template(engine, messages, options \\ []),
    do: Chat.apply_template(engine, messages, options)

  @doc """
  Like `apply_chat_template/3`, but returns the prompt or the prompts, or raises `VLLM.Error`.

      VLLM.apply_chat_template!(llm, [[role: "user", content: "Hello!"]]).prompt
  """
  @spec apply_chat_template!(engine(), conversation() | [conversation()], keyword() | map()) ::
          rendered | [rendered]
        when rendered: %{prompt: String.t(), prompt_token_ids: [non_neg_integer()]}
  def apply_chat_template!(engine, messages, options \\ []),
    do: bang!(apply_chat_template(engine, messages, options))

  @doc """
  Completes one prompt as a stream: a lazy enumerable of `{:ok, %VLLM.Delta{}}`, and at last
  `{:error, %VLLM.Error{}}` if it ends with an error.

  Nothing happens until it is enumerated, which is to be done in one process. Leaving it early
  (`Enum.take/2`), or the death of that process, aborts the request in vLLM at once. A slow reader
  gets fewer and longer deltas. Options and errors are those of `generate/3`; the `timeout` counts
  from the start of the enumeration to the end of the stream. One option more:

  #{Options.docs(Options.stream())}

  For example:

      llm
      |> VLLM.stream("Count:", max_tokens: 200)
      |> Enum.take(3)
  """
  @spec stream(engine(), prompt(), keyword() | map()) :: Enumerable.t()
  def stream(engine, prompt, options \\ []), do: Completions.stream(engine, prompt, options)

  @doc "Like `stream/3`, but yields the deltas themselves and raises `VLLM.Error`."
  @spec stream!(engine(), prompt(), keyword() | map()) :: Enumerable.t()
  def stream!(engine, prompt, options \\ []), do: Completions.stream!(engine, prompt, options)

  @doc """
  Like `stream!/3`, but yields the text of the first completion as it grows.

      llm |> VLLM.stream_text!("Count:") |> Enum.each(&IO.write/1)
  """
  @spec stream_text!(engine(), prompt(), keyword() | map()) :: Enumerable.t()
  def stream_text!(engine, prompt, options \\ []),
    do: engine |> stream!(prompt, options) |> Completions.texts()

  @doc """
  Streams to a process, for GenServers and LiveViews: returns a reference at once and sends

    * `{:vllm, ref, %VLLM.Delta{}}` for each delta, then
    * `{:vllm, ref, {:done, %VLLM.RequestOutput{}}}` with the whole output, or
      `{:vllm, ref, {:error, %VLLM.Error{}}}`.

  The death of the receiver, or `cancel/1`, aborts the request. While the receiver has 64 messages
  or more to read, it gets no more of these but the first, and then fewer and longer ones; what has come
  by the deadline it gets then, however many it has to read. Who receives several streams therefore
  reads the messages of all as they come: one who waits for more of the second while 64 of the first
  lie unread waits until its deadline. A receiver on a node without this library gets
  each as it comes: how many it has to read cannot be seen there.

      ref = VLLM.stream_to(MyApp.LLM, "Count:", self(), max_tokens: 200)
  """
  @spec stream_to(engine(), prompt(), pid(), keyword() | map()) :: reference()
  def stream_to(engine, prompt, pid \\ self(), options \\ []),
    do: Completions.stream_to(engine, prompt, pid, options)

  @doc """
  Ends a stream of `stream_to/4` and aborts its request. Once it has returned, the receiver that
  calls it gets no message of the stream any more; where another process calls it, the last message
  that the receiver gets is an error with the reason `:aborted`. An ended stream is no error.

  Where another node forwards the stream and does not answer within 5 s, `cancel/1` returns all the
  same: that node ends the stream when it goes on, and until then messages that were on the way may come.

      ref = VLLM.stream_to(MyApp.LLM, "Count:", self(), max_tokens: 200)
      :ok = VLLM.cancel(ref)
  """
  @spec cancel(reference()) :: :ok
  def cancel(ref) when is_reference(ref), do: VLLM.Streaming.Forwarder.cancel(ref)

  @doc """
  Completes many prompts, each as soon as it can be: a lazy enumerable of
  `{index, {:ok, %VLLM.RequestOutput{}} | {:error, %VLLM.Error{}}}` in the order in which they are
  done. `index` is the prompt's place in `prompts`, from 0.

  `prompts` may be any enumerable, larger than memory or endless: only as many are taken from it as
  vLLM computes at once. A prompt that cannot be completed does not end the others. Nothing happens
  until it is enumerated; where the options are wrong or there is no such engine, that is the error
  of each prompt. Options are those of `generate/3`; the `timeout` is each prompt's own.

      "prompts.txt"
      |> File.stream!()
      |> then(&VLLM.generate_stream(llm, &1, max_tokens: 64))
      |> Stream.each(fn {index, {:ok, output}} -> IO.puts([to_string(index), VLLM.text(output)]) end)
      |> Stream.run()
  """
  @spec generate_stream(engine(), Enumerable.t(), keyword() | map()) :: Enumerable.t()
  def generate_stream(engine, prompts, options \\ []),
    do: Completions.generate_stream(engine, prompts, options)

  @doc """
  Like `generate_stream/3`, but yields `{index, output}` and raises the `VLLM.Error` of the first
  prompt that cannot be completed.

      for {index, output} <- VLLM.generate_stream!(llm, ["a", "b"], max_tokens: 8),
          do: {index, VLLM.text(output)}
  """
  @spec generate_stream!(engine(), Enumerable.t(), keyword() | map()) :: Enumerable.t()
  def generate_stream!(engine, prompts, options \\ []) do
    engine
    |> generate_stream(prompts, options)
    |> Stream.map(fn {index, result} -> {index, bang!(result)} end)
  end

  @doc """
  Sampling parameters to use in many calls; see `VLLM.SamplingParams`.

      iex> VLLM.sampling_params(temprature: 0.8)
      {:error,
       %VLLM.Error{
         reason: :invalid_option,
         message: "Unknown option `temprature`. Did you mean `temperature`?",
         details: %{
           "option" => "temprature",
           "nearest" => "temperature",
           "remedy" => "Did you mean `temperature`?"
         }
       }}
  """
  @spec sampling_params(keyword() | map()) :: {:ok, SamplingParams.t()} | {:error, Error.t()}
  def sampling_params(params), do: SamplingParams.new(params)

  @doc """
  Like `sampling_params/1`, but returns the parameters or raises `VLLM.Error`.

      iex> VLLM.sampling_params!(temperature: 0.8, top_p: 0.95, n: 2).n
      2
  """
  @spec sampling_params!(keyword() | map()) :: SamplingParams.t()
  def sampling_params!(params), do: bang!(sampling_params(params))

  @doc """
  Beam search parameters to use in many calls; see `VLLM.BeamSearchParams`.

      iex> {:error, error} = VLLM.beam_search_params(beam_with: 4)
      iex> error.message
      "Unknown option `beam_with`. Did you mean `beam_width`?"
  """
  @spec beam_search_params(keyword() | map()) ::
          {:ok, BeamSearchParams.t()} | {:error, Error.t()}
  def beam_search_params(params), do: BeamSearchParams.new(params)

  @doc """
  Like `beam_search_params/1`, but returns the parameters or raises `VLLM.Error`.

      iex> VLLM.beam_search_params!(beam_width: 4, max_tokens: 16).beam_width
      4
  """
  @spec beam_search_params!(keyword() | map()) :: BeamSearchParams.t()
  def beam_search_params!(params), do: bang!(beam_search_params(params))

  @doc """
  Pooling parameters to use in many calls; see `VLLM.PoolingParams`.

      iex> {:error, error} = VLLM.pooling_params(dimension: 256)
      iex> error.message
      "Unknown option `dimension`. Did you mean `dimensions`?"
  """
  @spec pooling_params(keyword() | map()) :: {:ok, PoolingParams.t()} | {:error, Error.t()}
  def pooling_params(params), do: PoolingParams.new(params)

  @doc """
  Like `pooling_params/1`, but returns the parameters or raises `VLLM.Error`.

      iex> VLLM.pooling_params!(dimensions: 256).dimensions
      256
  """
  @spec pooling_params!(keyword() | map()) :: PoolingParams.t()
  def pooling_params!(params), do: bang!(pooling_params(params))

  @doc """
  A LoRA adapter to apply to requests: the `lora_request:` of `generate/3`, `chat/3` and `stream/3`.

  `path` is a folder in peft's format, a name that `VLLM.Models` has of one, or an adapter's id on the
  Hugging Face hub, which is downloaded when it is first used. Where it is a name of `VLLM.Models`, requests
  may give that alone: `lora_request: "sql"`. `name` is yours to choose; the engine loads the adapter under it with the first
  request, or with `load_lora/3`. The engine must be started with `enable_lora: true`; requests
  with different adapters, and with none, are computed together (`max_loras:`).

  ## Options

  #{Options.docs(Options.lora_request())}

  ## Errors

  A wrong option is `:invalid_option`. What is wrong with an adapter shows when it is used, and
  the engine goes on: `:unsupported` (`enable_lora: true` is missing, or vLLM has no such adapters),
  `:model_not_found`, `:model_gated`, `:hub_unreachable`, `:invalid_checkpoint` (damaged, or made for
  another model), `:invalid_option` (its rank is above `max_lora_rank:`, or its name or id is that of
  another one).

      sql = VLLM.lora_request!("sql", "/adapters/sql")
      VLLM.generate!(llm, "How many users are there?", lora_request: sql)

  An id may also come second, as in vLLM's `LoRARequest`:

      iex> {:ok, request} = VLLM.lora_request("sql", 1, "/adapters/sql")
      iex> request == VLLM.lora_request!("sql", "/adapters/sql", lora_int_id: 1)
      true
  """
  @spec lora_request(String.t(), String.t(), keyword() | map()) ::
          {:ok, LoRARequest.t()} | {:error, Error.t()}
  @spec lora_request(String.t(), pos_integer(), String.t()) ::
          {:ok, LoRARequest.t()} | {:error, Error.t()}
  def lora_request(name, path_or_id, options_or_path \\ []),
    do: LoRA.request(name, path_or_id, options_or_path)

  @doc "Like `lora_request/3`, with the id second and the path third."
  @spec lora_request(String.t(), pos_integer(), String.t(), keyword() | map()) ::
          {:ok, LoRARequest.t()} | {:error, Error.t()}
  def lora_request(name, id, path, options), do: LoRA.request(name, id, path, options)

  @doc """
  Like `lora_request/3`, but returns the adapter or raises `VLLM.Error`.

      iex> VLLM.lora_request!("sql", "/adapters/sql").lora_name
      "sql"
  """
  @spec lora_request!(String.t(), String.t(), keyword() | map()) :: LoRARequest.t()
  @spec lora_request!(String.t(), pos_integer(), String.t()) :: LoRARequest.t()
  def lora_request!(name, path_or_id, options_or_path \\ []),
    do: bang!(lora_request(name, path_or_id, options_or_path))

  @doc "Like `lora_request/4`, but returns the adapter or raises `VLLM.Error`."
  @spec lora_request!(String.t(), pos_integer(), String.t(), keyword() | map()) ::
          LoRARequest.t()
  def lora_request!(name, id, path, options), do: bang!(lora_request(name, id, path, options))

  @doc """
  Loads an adapter, given as it is or by its name of `VLLM.Models`, into each worker that runs, so that
  the first request with it need not wait, or to see whether it fits. One that is loaded is left as it is, unless it has `load_inplace: true`.

  A worker that is started again has no adapters; they come with the requests that name them. So do those
  that vLLM dropped for others (`max_cpu_loras:`).

  ## Options

  #{Options.docs(Options.call())}

  ## Errors

  Those of `lora_request/3` and of any call.

      :ok = VLLM.load_lora(llm, VLLM.lora_request!("sql", "/adapters/sql"))
  """
  @spec load_lora(engine(), LoRARequest.t() | String.t(), keyword() | map()) ::
          :ok | {:error, Error.t()}
  def load_lora(engine, lora_request, options \\ []),
    do: LoRA.load(engine, lora_request, options)

  @doc "Like `load_lora/3`, but raises `VLLM.Error`."
  @spec load_lora!(engine(), LoRARequest.t() | String.t(), keyword() | map()) :: :ok
  def load_lora!(engine, lora_request, options \\ []),
    do: bang!(load_lora(engine, lora_request, options))

  @doc """
  Has each worker forget an adapter, given as it was loaded or by its name. No request should be
  using it. `:model_not_found` where no worker has one of that name.

      :ok = VLLM.unload_lora(llm, "sql")
  """
  @spec unload_lora(engine(), LoRARequest.t() | String.t(), keyword() | map()) ::
          :ok | {:error, Error.t()}
  def unload_lora(engine, lora, options \\ []), do: LoRA.unload(engine, lora, options)

  @doc "Like `unload_lora/3`, but raises `VLLM.Error`."
  @spec unload_lora!(engine(), LoRARequest.t() | String.t(), keyword() | map()) :: :ok
  def unload_lora!(engine, lora, options \\ []), do: bang!(unload_lora(engine, lora, options))

  @doc """
  The adapters that vLLM holds in memory now.

      {:ok, adapters} = VLLM.list_loras(llm)
      Enum.map(adapters, & &1.lora_name)
  """
  @spec list_loras(engine(), keyword() | map()) ::
          {:ok, [LoRARequest.t()]} | {:error, Error.t()}
  def list_loras(engine, options \\ []), do: LoRA.list(engine, options)

  @doc "Like `list_loras/2`, but returns the adapters or raises `VLLM.Error`."
  @spec list_loras!(engine(), keyword() | map()) :: [LoRARequest.t()]
  def list_loras!(engine, options \\ []), do: bang!(list_loras(engine, options))

  @doc """
  Makes a vector of one prompt or of each of a list of them, in their order.

  The engine must run a model for it: one that was trained to embed (`"BAAI/bge-small-en-v1.5"`), or one that generates, started
  with `runner: "pooling", convert: "embed"`. Pooling parameters (see `VLLM.PoolingParams`) are given
  inline or as `pooling_params:`.

  ## Options

  #{Options.docs(Options.pool())}

  ## Errors

  `:unsupported` for an engine that does something else (the message has the options of one that
  would do), and those of `generate/3`.

      {:ok, [embedding]} = VLLM.embed(llm, "The capital of France is Paris.")
      VLLM.Embedding.to_list(embedding)
  """
  @spec embed(engine(), prompt() | [prompt()], keyword() | map()) ::
          {:ok, [Embedding.t()]} | {:error, Error.t()}
  def embed(engine, prompts, options \\ []), do: Pooling.embed(engine, prompts, options)

  @doc """
  Like `embed/3`, but returns the vectors or raises `VLLM.Error`.

      VLLM.embed!(llm, ["a", "b"], tokenization_kwargs: [truncate_prompt_tokens: -1])
  """
  @spec embed!(engine(), prompt() | [prompt()], keyword() | map()) :: [Embedding.t()]
  def embed!(engine, prompts, options \\ []), do: bang!(embed(engine, prompts, options))

  @doc """
  Says how likely each class is for one prompt or for each of a list of them, in their order.

  The engine must run a classifier (a model for sequence classification, such as
  `"papluca/xlm-roberta-base-language-detection"`). Options and errors are
  those of `embed/3`.

      {:ok, [classification]} = VLLM.classify(llm, "Paris est la capitale de la France.")
      classification.label
  """
  @spec classify(engine(), prompt() | [prompt()], keyword() | map()) ::
          {:ok, [Classification.t()]} | {:error, Error.t()}
  def classify(engine, prompts, options \\ []), do: Pooling.classify(engine, prompts, options)

  @doc """
  Like `classify/3`, but returns the classifications or raises `VLLM.Error`.

      VLLM.classify!(llm, "Paris est la capitale de la France.", use_activation: false)
  """
  @spec classify!(engine(), prompt() | [prompt()], keyword() | map()) :: [Classification.t()]
  def classify!(engine, prompts, options \\ []), do: bang!(classify(engine, prompts, options))

  @doc """
  Gives what the engine's pooling task makes of one prompt or of each of a list of them, in their
  order, as it is.

  That is how to get what has no function of its own: the vectors of all tokens (for late
  interaction) of an engine with `pooler_config: %{task: "token_embed"}`, or their classes (for named
  entities) with `pooler_config: %{task: "token_classify"}`.

  ## Options

  #{Options.docs(Options.encode())}

  Errors are those of `embed/3`.

      {:ok, [output]} = VLLM.encode(llm, "The capital of France is Paris.")
      [tokens, dimensions] = output.shape
  """
  @spec encode(engine(), prompt() | [prompt()], keyword() | map()) ::
          {:ok, [PoolingOutput.t()]} | {:error, Error.t()}
  def encode(engine, prompts, options \\ []), do: Pooling.encode(engine, prompts, options)

  @doc """
  Like `encode/3`, but returns the outputs or raises `VLLM.Error`.

      VLLM.encode!(llm, "The capital of France is Paris.", pooling_task: "token_embed")
  """
  @spec encode!(engine(), prompt() | [prompt()], keyword() | map()) :: [PoolingOutput.t()]
  def encode!(engine, prompts, options \\ []), do: bang!(encode(engine, prompts, options))

  @doc """
  Says how well texts fit together: one with each of several, or two lists of a length pair by
  pair. The scores come in the order of `data_2`.

  With a model that embeds, a score is the cosine of two vectors; with one that embeds tokens, the
  sum of the best match of each token of the first text; with a cross-encoder (a classifier of one
  class), what the model says of both texts in one prompt. All pairs of a call go to one worker.

  ## Options

  #{Options.docs(Options.score())}

  Errors are those of `embed/3`; `:invalid_prompt` also for texts that make no pairs.

      {:ok, [score]} = VLLM.score(llm, "What is the capital of France?", "It is Paris.")
      score.score
  """
  @spec score(engine(), String.t() | [String.t()], String.t() | [String.t()], keyword() | map()) ::
          {:ok, [Score.t()]} | {:error, Error.t()}
  def score(engine, data_1, data_2, options \\ []),
    do: Pooling.score(engine, data_1, data_2, options)

  @doc """
  Like `score/4`, but returns the scores or raises `VLLM.Error`.

      VLLM.score!(llm, "What is the capital of France?", ["It is Paris.", "It is big."])
  """
  @spec score!(engine(), String.t() | [String.t()], String.t() | [String.t()], keyword() | map()) ::
          [Score.t()]
  def score!(engine, data_1, data_2, options \\ []),
    do: bang!(score(engine, data_1, data_2, options))

  @doc """
  Sorts documents by how well they fit a query: their scores, best first. The `:index` of a score
  says which document it is.

  ## Options

  #{Options.docs(Options.rerank())}

  Models and errors are those of `score/4`.

      documents = ["It is big.", "Paris.", "I do not know."]
      {:ok, scores} = VLLM.rerank(llm, "What is the capital of France?", documents, top_n: 2)
      Enum.map(scores, &Enum.at(documents, &1.index))
  """
  @spec rerank(engine(), String.t(), [String.t()], keyword() | map()) ::
          {:ok, [Score.t()]} | {:error, Error.t()}
  def rerank(engine, query, documents, options \\ []),
    do: Pooling.rerank(engine, query, documents, options)

  @doc """
  Like `rerank/4`, but returns the scores or raises `VLLM.Error`.

      [best | _] = VLLM.rerank!(llm, "What is the capital of France?", ["It is big.", "Paris."])
  """
  @spec rerank!(engine(), String.t(), [String.t()], keyword() | map()) :: [Score.t()]
  def rerank!(engine, query, documents, options \\ []),
    do: bang!(rerank(engine, query, documents, options))

  @doc """
  What completions must conform to, for the sampling parameter `structured_outputs`; see
  `VLLM.StructuredOutputsParams`. For a JSON schema there is `schema:` too, which also gives the
  parsed value.

      iex> VLLM.structured_outputs(chioce: ["yes", "no"])
      {:error,
       %VLLM.Error{
         reason: :invalid_option,
         message: "Unknown option `chioce`. Did you mean `choice`?",
         details: %{
           "option" => "chioce",
           "nearest" => "choice",
           "remedy" => "Did you mean `choice`?"
         }
       }}
  """
  @spec structured_outputs(keyword() | map()) ::
          {:ok, StructuredOutputsParams.t()} | {:error, Error.t()}
  def structured_outputs(params), do: StructuredOutputsParams.new(params)

  @doc """
  Like `structured_outputs/1`, but returns the parameters or raises `VLLM.Error`.

      iex> VLLM.structured_outputs!(choice: ["yes", "no"]).choice
      ["yes", "no"]
  """
  @spec structured_outputs!(keyword() | map()) :: StructuredOutputsParams.t()
  def structured_outputs!(params), do: bang!(structured_outputs(params))

  @doc """
  The text of an output's first completion; of a list of outputs, a list of texts.

      iex> VLLM.text(%VLLM.RequestOutput{outputs: [%VLLM.CompletionOutput{text: " Paris."}]})
      " Paris."
  """
  @spec text(RequestOutput.t()) :: String.t()
  @spec text([RequestOutput.t()]) :: [String.t()]
  defdelegate text(output), to: RequestOutput

  @doc """
  How many tokens an output took, or a list of outputs together, by OpenAI's names: of the prompt,
  of all completions, of both, and how many of the prompt's were in the prefix cache. Vectors,
  classes and scores have a prompt and no completion.

      iex> completion = %VLLM.CompletionOutput{token_ids: [3681, 29889]}
      iex> output = %VLLM.RequestOutput{prompt_token_ids: [450, 7483, 310], outputs: [completion]}
      iex> VLLM.usage([output, %{output | num_cached_tokens: 2}])
      %{prompt_tokens: 6, completion_tokens: 4, total_tokens: 10, cached_tokens: 2}
  """
  @spec usage(output | [output]) :: %{
          prompt_tokens: non_neg_integer(),
          completion_tokens: non_neg_integer(),
          total_tokens: non_neg_integer(),
          cached_tokens: non_neg_integer()
        }
        when output:
               RequestOutput.t()
               | Embedding.t()
               | Classification.t()
               | Score.t()
               | PoolingOutput.t()
  def usage(outputs), do: Usage.of(outputs)

  @doc """
  What the engine is: a map with `:model`, `:dtype`, `:quantization` (as detected, nil for none),
  `:kv_cache_dtype`, `:kv_cache_tokens`, `:max_model_len`, `:tensor_parallel_size`,
  `:pipeline_parallel_size`, `:data_parallel_size`, `:vllm_version`, `:device` and more; see
  `t:VLLM.EngineInfo.t/0`.

  Waits for a starting engine for at most `timeout` milliseconds.

      {:ok, info} = VLLM.engine_info(llm)
      {info.quantization, info.kv_cache_tokens}
  """
  @spec engine_info(engine(), timeout()) :: {:ok, VLLM.EngineInfo.t()} | {:error, Error.t()}
  def engine_info(engine, timeout \\ 300_000), do: Admin.info(engine, timeout)

  @doc "Like `engine_info/2`, but returns the information or raises `VLLM.Error`."
  @spec engine_info!(engine(), timeout()) :: VLLM.EngineInfo.t()
  def engine_info!(engine, timeout \\ 300_000), do: bang!(engine_info(engine, timeout))

  @doc """
  The tokens of a text: a list of ids; of a list of texts, a list of such lists.

  #{Options.docs(Options.tokenize())}

  For example:

      {:ok, ids} = VLLM.tokenize(llm, "The capital of France is")
  """
  @spec tokenize(engine(), String.t() | [String.t()], keyword() | map()) ::
          {:ok, [non_neg_integer()] | [[non_neg_integer()]]} | {:error, Error.t()}
  def tokenize(engine, text, options \\ []), do: Tokenizer.tokenize(engine, text, options)

  @doc "Like `tokenize/3`, but returns the tokens or raises `VLLM.Error`."
  @spec tokenize!(engine(), String.t() | [String.t()], keyword() | map()) ::
          [non_neg_integer()] | [[non_neg_integer()]]
  def tokenize!(engine, text, options \\ []), do: bang!(tokenize(engine, text, options))

  @doc """
  The text that token ids stand for.

  #{Options.docs(Options.detokenize())}

  For example:

      {:ok, ids} = VLLM.tokenize(llm, "The capital of France is")
      {:ok, "The capital of France is"} = VLLM.detokenize(llm, ids)
  """
  @spec detokenize(engine(), [non_neg_integer()], keyword() | map()) ::
          {:ok, String.t()} | {:error, Error.t()}
  def detokenize(engine, token_ids, options \\ []) do
    Tokenizer.detokenize(engine, token_ids, options)
  end

  @doc "Like `detokenize/3`, but returns the text or raises `VLLM.Error`."
  @spec detokenize!(engine(), [non_neg_integer()], keyword() | map()) :: String.t()
  def detokenize!(engine, token_ids, options \\ []) do
    bang!(detokenize(engine, token_ids, options))
  end

  @doc """
  Whether the engine is well: `:ok`, or the error of its worker. Waits for a starting engine; give
  it a short `timeout:` to find out about one that hangs.

      :ok = VLLM.health(llm, timeout: 10_000)
  """
  @spec health(engine(), keyword() | map()) :: :ok | {:error, Error.t()}
  def health(engine, options \\ []), do: Admin.tell(engine, "health", options)

  @doc "Like `health/2`, but raises `VLLM.Error`."
  @spec health!(engine(), keyword() | map()) :: :ok
  def health!(engine, options \\ []), do: bang!(health(engine, options))

  @doc """
  vLLM's own figures: a map from the names of its
  [Prometheus metrics](https://docs.vllm.ai/en/latest/usage/metrics.html), without `vllm:`, to
  numbers, and for histograms to maps with `"count"` and `"sum"`. Figures of several labels, and of
  several workers, are added up; shares (`…_perc`) are averaged over workers.

      {:ok, %{"num_requests_running" => running, "kv_cache_usage_perc" => used}} = VLLM.metrics(llm)

  Among them: `num_requests_running`, `num_requests_waiting`, `kv_cache_usage_perc`,
  `prefix_cache_queries` and `prefix_cache_hits` (tokens), `prompt_tokens`, `generation_tokens`,
  `time_to_first_token_seconds`. They move with each step of the engine. For Prometheus, with all
  labels and buckets, there is `VLLM.Metrics.text/1`.
  """
  @spec metrics(engine(), keyword() | map()) ::
          {:ok, %{String.t() => number() | %{String.t() => number()}}} | {:error, Error.t()}
  def metrics(engine, options \\ []), do: Admin.metrics(engine, options)

  @doc "Like `metrics/2`, but returns the figures or raises `VLLM.Error`."
  @spec metrics!(engine(), keyword() | map()) :: %{
          String.t() => number() | %{String.t() => number()}
        }
  def metrics!(engine, options \\ []), do: bang!(metrics(engine, options))

  @doc """
  Forgets the KV cache of prompts that were computed before. `:unsupported` while requests run.

      :ok = VLLM.reset_prefix_cache(llm)
  """
  @spec reset_prefix_cache(engine(), keyword() | map()) :: :ok | {:error, Error.t()}
  def reset_prefix_cache(engine, options \\ []) do
    Admin.tell(engine, "reset_prefix_cache", options)
  end

  @doc "Like `reset_prefix_cache/2`, but raises `VLLM.Error`."
  @spec reset_prefix_cache!(engine(), keyword() | map()) :: :ok
  def reset_prefix_cache!(engine, options \\ []), do: bang!(reset_prefix_cache(engine, options))

  @doc """
  Forgets the images that were prepared for the model before, of prompts with images.

      :ok = VLLM.reset_mm_cache(llm)
  """
  @spec reset_mm_cache(engine(), keyword() | map()) :: :ok | {:error, Error.t()}
  def reset_mm_cache(engine, options \\ []), do: Admin.tell(engine, "reset_mm_cache", options)

  @doc "Like `reset_mm_cache/2`, but raises `VLLM.Error`."
  @spec reset_mm_cache!(engine(), keyword() | map()) :: :ok
  def reset_mm_cache!(engine, options \\ []), do: bang!(reset_mm_cache(engine, options))

  @doc """
  Forgets what the model's encoder made of images before; to be called when its weights change.

      :ok = VLLM.reset_encoder_cache(llm)
  """
  @spec reset_encoder_cache(engine(), keyword() | map()) :: :ok | {:error, Error.t()}
  def reset_encoder_cache(engine, options \\ []) do
    Admin.tell(engine, "reset_encoder_cache", options)
  end

  @doc "Like `reset_encoder_cache/2`, but raises `VLLM.Error`."
  @spec reset_encoder_cache!(engine(), keyword() | map()) :: :ok
  def reset_encoder_cache!(engine, options \\ []), do: bang!(reset_encoder_cache(engine, options))

  @doc """
  Frees the device's memory and keeps the engine, until `wake_up/2`. Needs an engine that was
  started with `enable_sleep_mode: true`, on a device that supports it; else `:unsupported`.
  Requests in flight end with `:aborted`, and what there is of them in `details["outputs"]`.

  #{Options.docs(Options.sleep())}

  For example:

      :ok = VLLM.sleep(llm, level: 2)
  """
  @spec sleep(engine(), keyword() | map()) :: :ok | {:error, Error.t()}
  def sleep(engine, options \\ []), do: Admin.tell(engine, "sleep", options, Options.sleep())

  @doc "Like `sleep/2`, but raises `VLLM.Error`."
  @spec sleep!(engine(), keyword() | map()) :: :ok
  def sleep!(engine, options \\ []), do: bang!(sleep(engine, options))

  @doc """
  Wakes an engine that `sleep/2` put to sleep. `:unsupported` where it cannot sleep.

      :ok = VLLM.wake_up(llm)
  """
  @spec wake_up(engine(), keyword() | map()) :: :ok | {:error, Error.t()}
  def wake_up(engine, options \\ []), do: Admin.tell(engine, "wake_up", options)

  @doc "Like `wake_up/2`, but raises `VLLM.Error`."
  @spec wake_up!(engine(), keyword() | map()) :: :ok
  def wake_up!(engine, options \\ []), do: bang!(wake_up(engine, options))

  @doc """
  The versions at work: of this library and of the vLLM that it is made for.

      iex> VLLM.version().ex_vllm
      "0.1.0"
  """
  @spec version() :: %{ex_vllm: String.t(), vllm: String.t()}
  def version do
    %{ex_vllm: to_string(Application.spec(:ex_vllm, :vsn)), vllm: VLLM.Python.vllm_version()}
  end

  @doc """
  The same as `version/0`, which cannot fail.

      iex> VLLM.version!() == VLLM.version()
      true
  """
  @spec version!() :: %{ex_vllm: String.t(), vllm: String.t()}
  def version!, do: version()
end
