# A chat in one file: a page of Phoenix LiveView in front of an engine.
#
#     elixir examples/phoenix_chat.exs [MODEL]
#
# Then open http://localhost:4000. MODEL is a folder, or a name on the Hugging Face hub such as
# "Qwen/Qwen2.5-0.5B-Instruct"; by default the demo model, which knows what to say to "What is Elixir?"
# and "Count to ten.". `mix vllm.setup` must have been run. guides/phoenix.md has the same as steps in an
# application that is there already.

Mix.install([
  {:ex_vllm, path: Path.join(__DIR__, "..")},
  {:phoenix_live_view, "~> 1.0"},
  {:bandit, "~> 1.5"},
  {:jason, "~> 1.4"}
])

defmodule Chat.Page do
  use Phoenix.LiveView

  @options [max_tokens: 512]

  @impl true
  def mount(_params, _session, socket),
    do: {:ok, assign(socket, messages: [], stream: nil, answer: "", note: nil)}

  @impl true
  def render(assigns) do
    ~H"""
    <article :for={message <- @messages} class={message.role}>{message.content}</article>
    <article :if={@stream} class="assistant">{@answer}</article>
    <p :if={@note} role="status">{@note}</p>
    <form id="chat" phx-submit="ask">
      <input
        id={"question-#{length(@messages)}"}
        name="question"
        placeholder="Ask something"
        autocomplete="off"
        phx-mounted={Phoenix.LiveView.JS.focus()}
        required
      />
      <button :if={!@stream}>Send</button>
      <button :if={@stream} type="button" phx-click="stop">Stop</button>
    </form>
    """
  end

  # A question while an answer is under way gives that up.
  @impl true
  def handle_event("ask", %{"question" => question}, socket) do
    socket = give_up(socket)
    messages = socket.assigns.messages ++ [%{role: "user", content: question}]
    stream = VLLM.chat_stream_to(Chat.LLM, messages, self(), @options)
    {:noreply, assign(socket, messages: messages, stream: stream, answer: "", note: nil)}
  end

  def handle_event("stop", _params, socket), do: {:noreply, give_up(socket)}

  # A page that is closed ends this process, and with that its request: nothing is to be done for it.
  @impl true
  def handle_info({:vllm, stream, %VLLM.Delta{} = delta}, %{assigns: %{stream: stream}} = socket),
    do: {:noreply, assign(socket, answer: socket.assigns.answer <> delta.message.content)}

  def handle_info({:vllm, stream, {:done, _output}}, %{assigns: %{stream: stream}} = socket),
    do: {:noreply, say(socket)}

  def handle_info({:vllm, stream, {:error, error}}, %{assigns: %{stream: stream}} = socket),
    do: {:noreply, socket |> say() |> assign(note: Exception.message(error))}

  defp give_up(%{assigns: %{stream: nil}} = socket), do: socket

  defp give_up(socket) do
    # After this no message of the stream comes any more.
    :ok = VLLM.cancel(socket.assigns.stream)
    say(socket)
  end

  # What has been said is part of the conversation, also where it was broken off.
  defp say(%{assigns: %{answer: answer, messages: messages}} = socket) do
    said = if answer == "", do: [], else: [%{role: "assistant", content: answer}]
    assign(socket, messages: messages ++ said, stream: nil, answer: "")
  end
end

defmodule Chat.Layout do
  use Phoenix.Component

  # LiveView's own scripts, as its packages bring them: nothing is built, and no other host is asked.
  def root(assigns) do
    ~H"""
    <!DOCTYPE html>
    <html lang="en">
      <head>
        <meta charset="utf-8" />
        <meta name="viewport" content="width=device-width, initial-scale=1" />
        <meta name="csrf-token" content={Plug.CSRFProtection.get_csrf_token()} />
        <title>Chat</title>
        <link rel="icon" href="data:," />
        <style>
          body { font: 1rem/1.5 system-ui, sans-serif; max-width: 40rem; margin: 2rem auto; padding: 0 1rem }
          article { white-space: pre-wrap; margin: .5rem 0; padding: .5rem .75rem; border-radius: .5rem }
          article.user { background: #e8eefc; margin-left: 20% }
          article.assistant { background: #f2f2f0; margin-right: 20%; min-height: 1.5rem }
          form { display: flex; gap: .5rem; margin-top: 1rem }
          input { flex: 1; font: inherit; padding: .5rem }
          button { font: inherit; padding: .5rem 1rem }
        </style>
        <script src="/assets/phoenix/phoenix.min.js"></script>
        <script src="/assets/live_view/phoenix_live_view.min.js"></script>
        <script>
          const csrf = document.querySelector("meta[name=csrf-token]").content
          window.addEventListener("DOMContentLoaded", () =>
            new LiveView.LiveSocket("/live", Phoenix.Socket, {params: {_csrf_token: csrf}}).connect())
        </script>
      </head>
      <body>
        <h1>Chat</h1>
        {@inner_content}
      </body>
    </html>
    """
  end
end

defmodule Chat.Router do
  use Phoenix.Router
  import Phoenix.LiveView.Router

  pipeline :browser do
    plug :accepts, ["html"]
    plug :fetch_session
    plug :put_root_layout, html: {Chat.Layout, :root}
    plug :protect_from_forgery
    plug :put_secure_browser_headers
  end

  scope "/" do
    pipe_through :browser
    live "/", Chat.Page
  end

  # The same engine for programs that speak OpenAI's API.
  forward "/v1", VLLM.Plug, models: [{"chat", Chat.LLM}]
end

defmodule Chat.Endpoint do
  use Phoenix.Endpoint, otp_app: :chat

  @session [store: :cookie, key: "_chat", signing_salt: "chat"]

  socket "/live", Phoenix.LiveView.Socket, websocket: [connect_info: [session: @session]]
  plug Plug.Static, at: "/assets/phoenix", from: {:phoenix, "priv/static"}
  plug Plug.Static, at: "/assets/live_view", from: {:phoenix_live_view, "priv/static"}
  plug Plug.Session, @session
  plug Chat.Router
end

Application.put_env(:chat, Chat.Endpoint,
  adapter: Bandit.PhoenixAdapter,
  http: [ip: {127, 0, 0, 1}, port: 4000],
  server: true,
  secret_key_base: Base.encode64(:crypto.strong_rand_bytes(48)),
  live_view: [signing_salt: Base.encode64(:crypto.strong_rand_bytes(8))]
)

demo = Application.app_dir(:ex_vllm, "priv/models/demo")
model = List.first(System.argv(), demo)
# The demo model is small, and is to be there soon.
small = [max_model_len: 1024, enforce_eager: true, kv_cache_memory_bytes: 64 * 1024 * 1024]

children = [
  {VLLM, [name: Chat.LLM, model: model] ++ if(model == demo, do: small, else: [])},
  Chat.Endpoint
]

{:ok, _supervisor} = Supervisor.start_link(children, strategy: :one_for_one)
Process.sleep(:infinity)
