// Renders conversations with Go's text/template, as Ollama does: a request a line on
// stdin, {"template", "system", "messages"}, and a JSON text a line on stdout.
package main

import (
	"bufio"
	"encoding/json"
	"os"
	"strings"
	"text/template"
)

type Message struct{ Role, Content string }

type Request struct {
	Template string
	System   string
	Messages []Message
}

func main() {
	lines := bufio.NewScanner(os.Stdin)
	lines.Buffer(nil, 1<<24)
	for lines.Scan() {
		var request Request
		if err := json.Unmarshal(lines.Bytes(), &request); err != nil {
			panic(err)
		}
		parsed := template.Must(
			template.New("").Option("missingkey=zero").Parse(request.Template))
		var text strings.Builder
		err := parsed.Execute(&text, map[string]any{
			"System": request.System, "Messages": request.Messages, "Response": ""})
		if err != nil {
			panic(err)
		}
		json.NewEncoder(os.Stdout).Encode(text.String())
	}
}
