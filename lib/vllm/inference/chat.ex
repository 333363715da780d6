defmodule VLLM.Chat do
  @moduledoc false
  # Answers to conversations, at once and as streams, and the prompts that
  # conversations become.

  alias VLLM.Engine.Call

  alias VLLM.{
    Completions,
    Conversation,
    Error,
    Inference,
    Options,
    Remote,
    RequestOutput,
    Streaming,
    TokenIds
  }

  alias VLLM.Streaming.Forwarder

  @doc "See `VLLM.chat/3`."
  @spec chat(
          VLLM.engine(),
          VLLM.conversation() | [VLLM.conversation()],
          keyword() | map()
        ) :: {:ok, [RequestOutput.t()]} | {:error, Error.t()}
  def chat(engine, messages, options) do
    with {:ok, call, params} <- Completions.prepare(options, Options.chat()),
         {:ok, _, conversations} <- Conversation.to_wire(messages),
         {:ok, outputs} <-
           Inference.map(engine, "chat", params, {"messages", conversations}, call),
         do: {:ok, Enum.map(outputs, &RequestOutput.from_wire/1)}
  end

  @doc "See `VLLM.chat_stream/3`."
  @spec stream(VLLM.engine(), VLLM.conversation(), keyword() | map()) :: Enumerable.t()
  def stream(engine, messages, options),
    do: Streaming.deltas(opener(engine, messages, options))

  @doc "See `VLLM.chat_stream!/3`."
  @spec stream!(VLLM.engine(), VLLM.conversation(), keyword() | map()) :: Enumerable.t()
  def stream!(engine, messages, options),
    do: Streaming.deltas!(opener(engine, messages, options))

  defp opener(engine, messages, options) do
    engine = Remote.pin(engine)
    fn -> open(engine, messages, options) end
  end

  @doc "See `VLLM.chat_stream_to/4`."
  @spec stream_to(VLLM.engine(), VLLM.conversation(), pid(), keyword() | map()) :: reference()
  def stream_to(engine, messages, pid, options),
    do: Forwarder.start(pid, fn -> open(engine, messages, options) end)

  defp open(engine, messages, options) do
    with {:ok, call, params} <- Completions.prepare(options, Options.chat() ++ Options.stream()),
         {:ok, conversation} <- one(messages),
         do: {:ok, {engine, "chat", Map.put(params, "messages", conversation), Call.begin(call)}}
  end

  defp one(messages) do
    case Conversation.to_wire(messages) do
      {:ok, _, [conversation]} ->
        {:ok, conversation}

      {:ok, :many, conversations} ->
        {:error,
         Error.new(
           :invalid_prompt,
           "A stream takes one conversation; got #{length(conversations)}."
         )}

      error ->
        error
    end
  end

  @doc "See `VLLM.apply_chat_template/3`."
  @spec apply_template(
          VLLM.engine(),
          VLLM.conversation() | [VLLM.conversation()],
          keyword() | map()
        ) :: {:ok, rendered | [rendered]} | {:error, Error.t()}
        when rendered: %{prompt: String.t(), prompt_token_ids: [non_neg_integer()]}
  def apply_template(engine, messages, options) do
    with {:ok, call, params, _known} <- Inference.prepare(options, Options.apply_chat_template()),
         {:ok, shape, conversations} <- Conversation.to_wire(messages),
         inputs = {"messages", conversations},
         {:ok, prompts} <- Inference.map(engine, "apply_chat_template", params, inputs, call) do
      prompts =
        for prompt <- prompts do
          %{
            prompt: prompt["prompt"],
            prompt_token_ids: TokenIds.unpack(prompt["prompt_token_ids"])
          }
        end

      {:ok, if(shape == :one, do: hd(prompts), else: prompts)}
    end
  end
end
